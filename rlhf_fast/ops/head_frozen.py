"""A head that is not trained: the gradient of each log-prob is stored in forward.

d logp_t / d hidden_t needs nothing from upstream. Backward scales it by d loss / d logp_t, so no
logits are kept or computed again, whatever the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.head import Grads, Head, Needs, Statistics, joined
from rlhf_fast.ops.head_columns import gradient_by_columns
from rlhf_fast.ops.head_recompute import backward_by_columns


def forward_with_gradient(head: Head, outputs: tuple[str, ...]) -> tuple[Statistics, Tensor]:
    """Statistics of all rows, and the gradient of every log-prob with respect to its own row."""
    if head.takes_columns():
        return gradient_by_columns(head, outputs)
    scratch = head.buffer(min(head.chunk_rows(), head.num_rows))
    gradient = torch.empty_like(head.hidden)
    weight, parts = head.weight_for_hidden(), []
    for rows in head.chunks():
        part, logits = head.select(rows), scratch[: rows.stop - rows.start]
        parts.append(part.statistics_with_gradient_(part.logits(logits), outputs))
        torch.mm(head.as_operand(logits), weight, out=gradient[rows])
    return joined(head, parts, outputs), gradient


def backward_from_gradient(
    head: Head, statistics: Statistics, grads: Grads, gradient: Tensor
) -> Tensor:
    """The gradient of hidden, from those of logps, entropy and lse."""
    grad_logps, *others = grads
    if grad_logps is None:
        d_hidden = torch.zeros_like(gradient)
    else:
        d_hidden = torch.empty_like(gradient)
        for rows in head.chunks():  # a product with float32 takes memory
            torch.mul(gradient[rows], grad_logps[rows, None], out=d_hidden[rows])
    if any(g is not None for g in others):  # rare enough to compute the logits again
        needs = Needs(hidden=True, weight=False, bias=False)
        args = (statistics, (None, *others), needs, gradient.dtype, head.buffer(0))
        d_hidden += backward_by_columns(head, *args)[0]
    return d_hidden
