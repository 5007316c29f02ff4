"""Losses of ranked lists: groups of scored items, with gradients in one call."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.ops import autograd, native, sequences
from rlhf_fast.ops.segment_sum import sums_and_counts

LIST_LOSSES = tuple(native.table("LIST_LOSSES"))
HINGES = ("pairwise_hinge", "rrhf")
REDUCTIONS = ("mean", "sum", "none")


@native.takes_tensors
def list_loss(
    scores: Tensor,
    labels: Tensor,
    cu_groups: Tensor,
    *,
    loss_type: str = "plackett_luce",
    margin: float = 0.0,
    nll_weight: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Loss of groups of items, of any sizes, that should be scored in the order of their labels.

    For `plackett_luce` (`list_mle`) equivalent to `logsumexp(s[k:]) - s[k]` summed over k, s the
    scores of a group from the best label to the worst; `LIST_LOSSES` names the others, and
    csrc/math/lists.h gives formula and source of each.

    Args:
        scores: [N], float32, float16 or bfloat16: beta * log-ratios, mean log-probs, or rewards.
        labels: [N] constants, greater is better: ratings, rewards, or minus the rank. Items with
            equal labels keep their order in `plackett_luce` and `pro` and make no pair elsewhere.
        cu_groups: (G + 1,) int32 or int64, where each group begins, and N.
        margin: of the pairwise hinge (SLiC's delta); RRHF has 0.
        nll_weight: of minus the best item's score (the SFT terms of RRHF and PRO).
        reduction: "mean" divides by the number of groups.

    Raises:
        ValueError: for shapes, dtypes and devices that do not fit, and on the CPU for empty groups
            and NaN labels.
    """
    _check(scores, labels, cu_groups, loss_type, margin, nll_weight, reduction)
    num_groups = cu_groups.shape[0] - 1
    scale = 1.0 / max(num_groups, 1) if reduction == "mean" else 1.0
    plain, cu_groups = sequences.plain, sequences.offsets(cu_groups)
    settings = (loss_type, margin, nll_weight, scale)
    losses, loss, gradients = _list_loss(plain(scores), plain(labels), cu_groups, *settings)
    if not autograd.wants_gradient(scores):
        return losses if reduction == "none" else loss
    if reduction != "none":
        return autograd.one_pass(loss, [scores.float()], [gradients])
    # One factor per group would have to be spread over its scores; a sum per group does that.
    shares = autograd.one_pass(torch.zeros_like(gradients), [scores.float()], [gradients])
    return losses + sums_and_counts(shares, cu_groups)[0]


def list_loss_ref(
    scores: Tensor,
    labels: Tensor,
    cu_groups: Tensor,
    *,
    loss_type: str = "plackett_luce",
    margin: float = 0.0,
    nll_weight: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """What `list_loss` computes, in plain PyTorch; float64 stays float64."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    labels = labels.to(scores.dtype)
    ends = cu_groups.tolist()
    losses = []
    for begin, end in zip(ends[:-1], ends[1:]):
        order = torch.argsort(labels[begin:end], descending=True, stable=True)
        s, y = scores[begin:end][order], labels[begin:end][order]
        losses.append(_group_ref(loss_type, s, y, margin) - nll_weight * s[0])
    losses = torch.stack(losses) if losses else scores.new_zeros(0) * scores.sum()
    if reduction == "none":
        return losses
    return losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1)


def _group_ref(loss_type: str, s: Tensor, y: Tensor, margin: float) -> Tensor:
    """Loss of one group; scores and labels come best first."""
    if loss_type in ("plackett_luce", "list_mle"):
        return sum(torch.logsumexp(s[k:], 0) - s[k] for k in range(len(s)))
    if loss_type == "pro":
        total = 0.0 * s.sum()
        for k in range(len(s) - 1):
            gaps = y[k] - y[k:]
            gaps = torch.cat((gaps.max()[None], gaps[1:]))
            total = total + torch.logsumexp(s[k:] * gaps, 0) - s[k] * gaps[0]
        return total
    better = y[:, None] > y[None, :]
    gap = s[:, None] - s[None, :]
    phi = torch.relu(margin - gap) if loss_type in HINGES else softplus(-gap)
    if loss_type == "lipo_lambda":
        order = torch.argsort(s, descending=True, stable=True)
        rank = torch.argsort(order).to(s.dtype) + 1
        discount = 1 / torch.log1p(rank)
        gain = torch.exp2(y)
        phi = phi * ((gain[:, None] - gain) * (discount[:, None] - discount)).abs().detach()
    return phi.masked_fill(~better, 0.0).sum()


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _empty_outputs(scores, labels, cu_groups, *args):
    shapes = ((cu_groups.shape[0] - 1,), (), scores.shape)
    return tuple(scores.new_empty(shape) for shape in shapes)


def _forward(scores, labels, cu_groups, loss_type, margin, nll_weight, scale):
    if native.debug() if scores.is_cuda else scores.numel() == 0:
        _check_groups(cu_groups, scores.numel())
    losses, total, grads = outputs = _empty_outputs(scores, labels, cu_groups)
    if scores.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    scores = scores.contiguous()
    workspace = scores.new_empty((2, *scores.shape), dtype=torch.float64)
    module, *where = native.target(scores)
    module.list_loss(
        *where,
        LIST_LOSSES.index(loss_type),
        sequences.pack(scores, cu_groups),
        *map(native.address, (scores, labels)),
        margin,
        nll_weight,
        scale,
        *map(native.address, (losses, grads, total, workspace)),
    )
    return outputs


_list_loss = native.Op(
    "list_loss_forward(Tensor scores, Tensor labels, Tensor cu_groups, str loss_type, "
    "float margin, float nll_weight, float scale) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
)


# ---- checks --------------------------------------------------------------------------------------


def _check(scores, labels, cu_groups, loss_type, margin, nll_weight, reduction) -> None:
    op = "list_loss"
    if scores.dim() != 1 or scores.dtype not in native.DTYPES:
        got = f"{scores.dtype} {tuple(scores.shape)}"
        must = "scores must have shape [N]"
        native.check(scores.dim() == 1, op, must, got, "flatten the groups")
        must = "scores must be float32, float16 or bfloat16"
        native.refuse(op, must, got, "convert them, or use list_loss_ref")
    sequences.check_like(op, "labels", labels, scores)
    sequences.check_offsets(op, cu_groups, "cu_groups")
    sequences.check_like(op, "cu_groups", cu_groups, scores, cu_groups.shape)
    _check_choices(loss_type, margin, nll_weight, reduction)


@native.remembered
def _check_choices(loss_type, margin, nll_weight, reduction) -> None:
    op = "list_loss"
    for name, value, known in (
        ("loss_type", loss_type, LIST_LOSSES),
        ("reduction", reduction, REDUCTIONS),
    ):
        native.check(value in known, op, f"{name} must be one of {known}", repr(value), "choose")
    native.check(
        abs(margin) < math.inf and (margin == 0 or loss_type == "pairwise_hinge"),
        op,
        f"margin must be left out for {loss_type!r}",
        margin,
        "pairwise_hinge takes a finite one",
    )
    native.check(
        0 <= nll_weight < math.inf, op, "nll_weight must be at least 0", nll_weight, "0 is none"
    )


def _check_groups(cu_groups: Tensor, total: int) -> None:
    """On CUDA, where it makes the GPU wait, and without items; else the CPU kernel checks."""
    good = (cu_groups[0] == 0) & (cu_groups[-1] == total) & (cu_groups.diff() > 0).all()
    native.check(
        bool(good),
        "list_loss",
        f"cu_groups must rise from 0 to {total} without an empty group",
        cu_groups.tolist() if cu_groups.numel() <= 9 else f"{cu_groups[:8].tolist()}...",
        "pass the cumulative group sizes",
    )
