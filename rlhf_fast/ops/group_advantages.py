"""Advantages of completions relative to the other completions of their prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences

ESTIMATORS: tuple[str, ...] = native.GROUP_ESTIMATORS


@native.takes_tensors
def group_advantages(
    rewards: Tensor,
    *,
    estimator: str = "grpo",
    num_generations: int | None = None,
    cu_groups: Tensor | None = None,
    group_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    k: int = 1,
    epsilon: float = 1e-6,
    unbiased: bool = True,
    keep_single: bool = False,
) -> Tensor:
    """One advantage per completion, from the rewards r of its group of n; computed in float64.

    | estimator | advantage | source |
    |---|---|---|
    | `grpo` | (r - mean) / (std + epsilon) | arXiv 2402.03300, section 4.1.2 |
    | `dr_grpo` | r - mean | arXiv 2503.20783, section 3.2; also REINFORCE++-baseline |
    | `rloo` | r - mean of the others | arXiv 2402.14740, section 2.3 |
    | `maxrl` | (r - mean) / (mean + epsilon) | arXiv 2602.02710, algorithm 1 |
    | `opo` | r - mean weighted by `lengths` | arXiv 2505.23585 |
    | `pass_at_k` | that of the best of k draws; right: r > 0 | arXiv 2508.10751, equations 11-15 |
    | `best` | (best - second) / (std + epsilon) of the best, or 0 | arXiv 2503.19595, section 3.1 |
    | `rank` | rank / (n - 1) - 1/2, ties share their mean rank | |

    REINFORCE++ whitens over the batch: `whiten(group_advantages(..., estimator="dr_grpo"))`. ReMax
    subtracts the reward of a greedy completion: no group is needed.

    Args:
        rewards: (N,), any floating type; the result is float32 and carries no gradient.
        num_generations, cu_groups, group_ids: the groups, said in one of three ways. Neighbours in
            groups of one size; neighbours, with offsets (G + 1,); or (N,) integers in any order,
            equal within a group.
        lengths: (N,), tokens of each completion; for `opo`.
        k: for `pass_at_k`, at most the size of the smallest group.
        epsilon: 1e-6 in verl, 1e-4 in TRL.
        unbiased: standard deviations divide by n - 1, as the peers do.
        keep_single: a completion alone in its group gets its reward (verl) instead of 0 (TRL).

    Raises:
        ValueError: for shapes, devices or settings that do not fit, and empty groups. On CUDA the
            groups' sizes are looked at with RLHF_FAST_DEBUG=1 only.
    """
    groups = (num_generations, cu_groups, group_ids)
    _check(rewards, estimator, *groups, lengths, k, epsilon)
    order = None
    if num_generations is not None:
        cu_groups = torch.arange(0, rewards.numel() + 1, num_generations, device=rewards.device)
    elif group_ids is not None:
        order, cu_groups = _sorted(group_ids)
        if k > 1 and not torch.compiler.is_compiling():
            _check_smallest(cu_groups, k)
    else:
        _check_sizes(cu_groups, rewards, k)

    def arranged(x: Tensor | None) -> Tensor | None:
        x = sequences.plain(x)
        return x if order is None or x is None else x[order]

    advantages = _group_advantages(
        arranged(rewards),
        sequences.offsets(cu_groups),
        arranged(lengths),
        ESTIMATORS.index(estimator),
        float(epsilon),
        k,
        unbiased,
        keep_single,
    )
    return (
        advantages if order is None else torch.empty_like(advantages).scatter(0, order, advantages)
    )


def group_advantages_ref(
    rewards: Tensor,
    *,
    estimator: str = "grpo",
    num_generations: int | None = None,
    cu_groups: Tensor | None = None,
    group_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    k: int = 1,
    epsilon: float = 1e-6,
    unbiased: bool = True,
    keep_single: bool = False,
) -> Tensor:
    """What `group_advantages` computes, group by group in plain PyTorch."""
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    if num_generations is not None:
        group_ids = torch.arange(len(rewards)) // num_generations
    elif cu_groups is not None:
        sizes = cu_groups.diff()
        group_ids = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes.cpu())
    group_ids = group_ids.to(rewards.device)
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique().tolist():
        members = (group_ids == group).nonzero()[:, 0]
        r = rewards[members]
        if len(r) == 1:
            scale = 1 + epsilon if estimator == "grpo" else 1.0
            advantages[members] = r / scale if keep_single else 0.0
            continue
        weights = None if lengths is None else lengths[members].to(r.dtype)
        advantages[members] = _ref_of_group(r, weights, estimator, k, epsilon, unbiased)
    return advantages


def _ref_of_group(r, weights, estimator, k, epsilon, unbiased) -> Tensor:
    mean, n = r.mean(), len(r)
    if estimator == "dr_grpo":
        return r - mean
    if estimator == "grpo":
        return (r - mean) / (r.std(unbiased=unbiased) + epsilon)
    if estimator == "rloo":
        return r - (r.sum() - r) / (n - 1)
    if estimator == "maxrl":
        return (r - mean) / (mean + epsilon)
    if estimator == "opo":
        return r - (weights * r).sum() / weights.sum()
    if estimator == "best":
        top = r.topk(2)
        best = torch.zeros_like(r)
        best[r.argmax()] = top.values[0] - top.values[1]
        return best / (r.std(unbiased=unbiased) + epsilon)
    if estimator == "rank":
        below = (r[None] < r[:, None]).sum(1) + ((r[None] == r[:, None]).sum(1) - 1) / 2
        return below.to(r.dtype) / (n - 1) - 0.5
    wrong = int((r <= 0).sum())
    mean = 1 - math.comb(wrong, k) / math.comb(n, k)
    deviation = math.sqrt(mean * (1 - mean))
    if deviation == 0:
        return torch.zeros_like(r)
    of_wrong = 1 - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)
    return (torch.where(r > 0, 1.0, of_wrong).to(r.dtype) - mean) / (deviation + epsilon)


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _forward(rewards, cu_groups, lengths, *settings):
    advantages = torch.empty_like(rewards)
    if rewards.numel():
        module, *where = native.target(rewards)
        module.group_advantages(
            *where,
            sequences.pack(rewards, cu_groups),
            *map(native.address, (rewards, lengths)),
            *settings,
            advantages.data_ptr(),
        )
    return advantages


_group_advantages = native.Op(
    "group_advantages(Tensor rewards, Tensor cu_groups, Tensor? lengths, int estimator, "
    "float epsilon, int k, bool unbiased, bool keep_single) -> Tensor",
    _forward,
    lambda rewards, *args: torch.empty_like(rewards),
)


# ---- checks --------------------------------------------------------------------------------------


def _sorted(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The order that makes groups neighbours, and as many offsets as there could be groups."""
    order = torch.argsort(group_ids, stable=True)
    ids = group_ids[order]
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    group = begins.cumsum(0) - 1
    sizes = torch.zeros_like(group).scatter_add(0, group, torch.ones_like(group))
    return order, torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _check(rewards, estimator, num_generations, cu_groups, group_ids, lengths, k, epsilon):
    op = "group_advantages"
    native.check(
        rewards.dim() == 1 and rewards.dtype in sequences.FLOATS,
        op,
        "rewards must be (N,) of a floating-point type, one per completion",
        f"{rewards.dtype} {tuple(rewards.shape)}",
        "sum token rewards over each completion",
    )
    native.check(
        estimator in ESTIMATORS,
        op,
        f"estimator must be one of {ESTIMATORS}",
        estimator,
        "see there",
    )
    given = [n for n in (num_generations, cu_groups, group_ids) if n is not None]
    native.check(
        len(given) == 1,
        op,
        "the groups must be said in exactly one way",
        f"{len(given)} of num_generations, cu_groups and group_ids",
        "pass one of them",
    )
    sequences.check_like(op, "lengths", lengths, rewards)
    sequences.check_like(op, "group_ids", group_ids, rewards)
    native.check(
        (lengths is not None) == (estimator == "opo"),
        op,
        "lengths must be given for opo alone",
        f"estimator {estimator} and lengths {'given' if lengths is not None else 'None'}",
        "opo weighs rewards with them",
    )
    native.check(
        0 <= epsilon < math.inf,
        op,
        "epsilon must be finite and not negative",
        epsilon,
        "it is added to what divides",
    )
    native.check(
        num_generations is None or (num_generations > 0 and len(rewards) % num_generations == 0),
        op,
        "num_generations must divide the number of rewards",
        f"{num_generations} for {len(rewards)} rewards",
        "pass cu_groups or group_ids for groups of unequal size",
    )
    native.check(
        k >= 1 and (num_generations is None or k <= num_generations),
        op,
        "k must lie between 1 and the size of a group",
        k,
        "there must be k completions to draw",
    )


def _check_smallest(cu_groups: Tensor, k: int) -> None:
    """Of groups as `_sorted` gives them. On CUDA only in debug mode: it makes the GPU wait."""
    if cu_groups.is_cuda and not native.debug():
        return
    sizes = cu_groups.diff()
    native.check(
        bool(((sizes == 0) | (sizes >= k)).all()),
        "group_advantages",
        f"no group may be smaller than k={k}",
        f"sizes {sizes[:8].tolist()}",
        "there must be k completions to draw",
    )


def _check_sizes(cu_groups: Tensor, rewards: Tensor, k: int) -> None:
    """On CUDA only in debug mode: it makes the GPU wait."""
    op = "group_advantages"
    sequences.check_offsets(op, cu_groups, "cu_groups")
    sequences.check_like(op, "cu_groups", cu_groups, rewards, cu_groups.shape)
    if cu_groups.is_cuda and not native.debug():
        return
    sizes, total = cu_groups.diff(), rewards.numel()
    native.check(
        bool((cu_groups[0] == 0) & (cu_groups[-1] == total) & (sizes >= max(k, 1)).all()),
        op,
        f"cu_groups must rise from 0 to {total} and no group may be empty or smaller than k={k}",
        f"sizes {sizes[:8].tolist()}",
        "leave out prompts without completions",
    )
