"""Generalised advantage estimation and discounted returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences

MASKED = ("skip", "zero")


class GaeOutput(NamedTuple):
    """What `gae` returns, float32, shaped like the rewards; 0 at masked tokens, no gradient."""

    advantages: Tensor
    returns: Tensor
    """advantages + values: the target of the value model."""


@native.takes_tensors
def gae(
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "skip",
    bootstrap_values: Tensor | None = None,
) -> GaeOutput:
    """Advantages and returns of each sequence, scanned from its last token to its first.

    Equivalent to `delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}` in
    a loop over t, with V = 0 after the last token. Without `values` and with `lam=1`, `returns` are
    the discounted sums of rewards. Nothing is whitened: see `whiten`.

    Args:
        rewards: (B, T), or (N,) packed with `cu_seqlens`; any floating type, computed in float32.
        values: like rewards; None counts as 0.
        gamma, lam: discount and trace decay, in [0, 1].
        mask: like rewards, bool, True where a token counts. What lies elsewhere is never read into
            a result.
        cu_seqlens: (S + 1,), where each packed sequence begins, and the end.
        masked: "skip": masked tokens are as if removed, so the state passes over tool output and
            padding (verl). "zero": they are steps of reward and value 0, which discount what comes
            after them (OpenRLHF).
        bootstrap_values: (B,) or (S,): V after the last token, for sequences cut short.

    Raises:
        ValueError: for shapes, devices or settings that do not fit.

    Source: arXiv 1506.02438, equation 16.
    """
    _check(rewards, values, gamma, lam, mask, cu_seqlens, masked, bootstrap_values)
    plain = sequences.plain
    return GaeOutput(
        *_gae(
            plain(rewards),
            plain(values),
            plain(mask, torch.bool),
            sequences.offsets(cu_seqlens),
            plain(bootstrap_values),
            float(gamma),
            float(lam),
            masked == "skip",
        )
    )


def gae_ref(
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "skip",
    bootstrap_values: Tensor | None = None,
) -> GaeOutput:
    """What `gae` computes, in plain PyTorch; in float64 if the rewards are."""
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if cu_seqlens is not None:
        flat = {"rewards": rewards, "values": values, "mask": mask}
        parts = []
        for s, (begin, end) in enumerate(sequences.spans(rewards, cu_seqlens)):
            part = {k: None if v is None else v[None, begin:end] for k, v in flat.items()}
            last = None if bootstrap_values is None else bootstrap_values[s : s + 1]
            settings = dict(gamma=gamma, lam=lam, masked=masked, bootstrap_values=last)
            parts.append(gae_ref(**part, **settings))
        none = rewards.new_zeros(1, 0, dtype=dtype)
        return GaeOutput(*(torch.cat([none, *p], 1)[0] for p in zip(*parts)))

    counts = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards = rewards.detach().to(dtype).masked_fill(~counts, 0.0)
    values = torch.zeros_like(rewards) if values is None else values.detach().to(dtype)
    values = values.masked_fill(~counts, 0.0)
    advantage = rewards.new_zeros(len(rewards))
    next_value = advantage if bootstrap_values is None else bootstrap_values.detach().to(dtype)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        moves = counts[:, t] if masked == "skip" else torch.ones_like(counts[:, t])
        advantage = torch.where(moves, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(moves, values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1) if columns else rewards
    advantages = advantages.masked_fill(~counts, 0.0)
    return GaeOutput(advantages, advantages + values)


@native.takes_tensors
def macro_gae(
    rewards: Tensor,
    values: Tensor,
    starts: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GaeOutput:
    """`gae` over macro actions: runs of tokens that are decided, valued and credited as one.

    Equivalent to `gae` on one step per macro action, whose reward is the sum and whose value is the
    mean over its tokens; every token receives its macro action's advantage and return. `gamma`
    discounts once per macro action.

    Args:
        starts: like rewards, bool, True where a macro action begins. A sequence's first token that
            counts always begins one. Masked tokens belong to none.

    Source: MA-RLHF, arXiv 2410.02743, section 3.2. The authors' program takes the mean of the
    rewards, too.
    """
    _check(rewards, values, gamma, lam, mask, cu_seqlens, "skip", None, op="macro_gae")
    sequences.check_like("macro_gae", "starts", starts, rewards)
    total, device = rewards.numel(), rewards.device
    if not torch.compiler.is_compiling():
        sequences.check_offset_values("macro_gae", cu_seqlens, total)
    counts = torch.ones(total, dtype=torch.bool, device=device)
    if mask is not None:
        counts = mask.reshape(-1)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(rewards.shape[0] + 1, device=device) * rewards.shape[1]
    # Number the macro actions; those of one sequence are neighbours, so they are packed sequences.
    token = torch.arange(total, device=device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    is_first = before[:-1] == before[cu_seqlens.long()][sequence]
    begins = counts & (starts.reshape(-1) | is_first)
    num_begun = torch.nn.functional.pad(begins.cumsum(0), (1, 0))
    macro = (num_begun[1:] - 1).clamp(min=0)
    # As many slots as tokens, so that no shape depends on the data; unused slots stay empty.
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    lengths = lengths.scatter_add(0, macro, counts.long())

    def reduce(x: Tensor, how: str) -> Tensor:
        x = sequences.plain(x).reshape(-1)[torch.argsort(~counts, stable=True)]
        padded = torch.cat([lengths, (total - lengths.sum())[None]])
        return torch.segment_reduce(x, how, lengths=padded, unsafe=True)[:-1].masked_fill(
            lengths == 0, 0.0
        )

    ends = num_begun[cu_seqlens.long()]
    ends = torch.cat([ends, ends.new_full((1,), total)])  # the unused slots, as one more sequence
    out = gae(reduce(rewards, "sum"), reduce(values, "mean"), gamma=gamma, lam=lam, cu_seqlens=ends)
    return GaeOutput(*(x[macro].masked_fill(~counts, 0.0).reshape(rewards.shape) for x in out))


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _outputs(rewards, *args):
    return torch.empty_like(rewards), torch.empty_like(rewards)


def _forward(rewards, values, mask, cu_seqlens, bootstrap_values, gamma, lam, skip_masked):
    sequences.check_offset_values("gae", cu_seqlens, rewards.numel())
    advantages, returns = _outputs(rewards)
    if rewards.numel():
        module, *where = native.target(rewards)
        module.gae_forward(
            *where,
            sequences.pack(rewards, cu_seqlens),
            *map(native.address, (rewards, values, mask, bootstrap_values)),
            gamma,
            lam,
            skip_masked,
            *map(native.address, (advantages, returns)),
        )
    return advantages, returns


_gae = native.Op(
    "gae_forward(Tensor rewards, Tensor? values, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? bootstrap_values, float gamma, float lam, bool skip_masked) -> (Tensor, Tensor)",
    _forward,
    _outputs,
)


# ---- checks --------------------------------------------------------------------------------------


def _check(rewards, values, gamma, lam, mask, cu_seqlens, masked, bootstrap_values, op="gae"):
    sequences.check_tokens(op, "rewards", rewards, cu_seqlens)
    sequences.check_like(op, "values", values, rewards)
    sequences.check_mask(op, mask, rewards)
    shape = (sequences.num_sequences(rewards, cu_seqlens),)
    sequences.check_like(op, "bootstrap_values", bootstrap_values, rewards, shape)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            native.refuse(op, f"{name} must lie in [0, 1]", value, "1 means no discount")
    if masked not in MASKED:
        native.refuse(op, f"masked must be one of {MASKED}", masked, "see gae")
