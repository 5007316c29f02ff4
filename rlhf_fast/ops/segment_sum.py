"""Sums and means of token values per sequence, packed or padded."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, native, sequences


@native.takes_tensors
def segment_sum(
    values: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    mean: bool = False,
) -> Tensor:
    """Sum, or mean, of each sequence's token values: [S] float32, in one read.

    Equivalent to `(values * weights).masked_fill(~mask, 0).sum(1)`, divided by
    `mask.sum(1).clamp(min=1)` for a mean, without the intermediates; the same for packed tokens.
    Masked values are not looked at: they may be NaN, and get gradient 0.

    Args:
        values: (B, T), or packed (N,) with `cu_seqlens`; computed in float32.
        cu_seqlens: (S + 1,) int32 or int64, cumulative lengths from 0 to N; may repeat.
        mask: bool like values, True where a token counts; all count without it.
        weights: constants like values that multiply them; a mean divides by tokens all the same.
        mean: divide by the number of tokens that count; a sequence without any gives 0.

    Raises:
        ValueError: for shapes, dtypes and devices that do not fit, and on the CPU for offsets that
            do not rise from 0 to N; on CUDA these are checked with RLHF_FAST_DEBUG=1.
    """
    return sums_and_counts(values, cu_seqlens, mask, weights, mean)[0]


def sums_and_counts(values, cu_seqlens=None, mask=None, weights=None, mean=False):
    """What `segment_sum` returns, and the number of tokens that count, both [S] float32."""
    _check(values, cu_seqlens, mask, weights)
    args = (
        sequences.offsets(cu_seqlens),
        None if mask is None else mask.contiguous(),
        sequences.plain(weights),
        mean,
    )
    if autograd.wants_gradient(values):
        return _SegmentSum.apply(values.float(), *args)
    return _segment_sum(values.float(), *args)


def segment_sum_ref(
    values: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    mean: bool = False,
) -> Tensor:
    """What `segment_sum` computes, in plain PyTorch; float64 stays float64."""
    x = values.to(torch.promote_types(values.dtype, torch.float32))
    if weights is not None:
        x = x * weights.to(x.dtype)
    counts = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    if mask is not None:
        x = x.masked_fill(~mask, 0.0)
    x, counts = x.flatten(), counts.flatten()
    spans = list(sequences.spans(values, cu_seqlens))
    if not spans:
        return x.new_zeros(0) * x.sum()
    sums = torch.stack([x[begin:end].sum() for begin, end in spans])
    if not mean:
        return sums
    return sums / torch.stack([counts[begin:end].sum() for begin, end in spans]).clamp(min=1)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, *args):
        sums, counts = _segment_sum(values, *args)
        cu_seqlens, mask, weights, ctx.mean = args
        ctx.save_for_backward(cu_seqlens, mask, weights, counts)
        ctx.shape = values.shape
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx, grad_sums, _):
        if autograd.wants_gradient(grad_sums):  # a sum is linear: nothing else matters
            autograd.refuse_second_order()
        *saved, counts = ctx.saved_tensors
        grad_values = _segment_sum_backward(grad_sums, *saved, ctx.mean, counts, ctx.shape)
        return grad_values, *(None,) * 4


# ---- the ops that torch's dispatcher knows -------------------------------------------------------


def _empty_sums(values, cu_seqlens, *args):
    count = sequences.num_sequences(values, cu_seqlens)
    return tuple(values.new_empty(count, dtype=torch.float32) for _ in range(2))


def _forward(values, cu_seqlens, mask, weights, mean):
    sequences.check_offset_values("segment_sum", cu_seqlens, values.numel())
    values = values.contiguous()
    sums, counts = _empty_sums(values, cu_seqlens)
    module, *where = native.target(values)
    module.segment_sum(
        *where,
        sequences.pack(values, cu_seqlens),
        *map(native.address, (values, mask, weights)),
        mean,
        *map(native.address, (sums, counts)),
    )
    return sums, counts


def _backward(grad_sums, cu_seqlens, mask, weights, mean, counts, shape):
    grad_sums = grad_sums.contiguous()
    grad_values = grad_sums.new_empty(shape)
    module, *where = native.target(grad_sums)
    module.segment_sum_backward(
        *where,
        sequences.pack(grad_values, cu_seqlens),
        *map(native.address, (mask, weights)),
        mean,
        *map(native.address, (counts, grad_sums, grad_values)),
    )
    return grad_values


_INPUTS = "Tensor? cu_seqlens, Tensor? mask, Tensor? weights, bool mean"
_segment_sum = native.Op(
    f"segment_sum_forward(Tensor values, {_INPUTS}) -> (Tensor, Tensor)", _forward, _empty_sums
)
_segment_sum_backward = native.Op(
    f"segment_sum_backward(Tensor grad_sums, {_INPUTS}, Tensor counts, SymInt[] shape) -> Tensor",
    _backward,
    lambda grad_sums, *args: grad_sums.new_empty(args[-1]),
)


def _check(values, cu_seqlens, mask, weights) -> None:
    op = "segment_sum"
    sequences.check_tokens(op, "values", values, cu_seqlens)
    sequences.check_mask(op, mask, values)
    sequences.check_like(op, "weights", weights, values)
    native.check(
        weights is None or not weights.requires_grad,
        op,
        "weights must be constants",
        "requires_grad=True",
        "detach them, or multiply the values before",
    )
