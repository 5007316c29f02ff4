"""The clipped squared error of a value model: value, gradient and metrics in one call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import aggregation, native, sequences

OP = "value_loss"

ValueMetrics = NamedTuple("ValueMetrics", [(name, Tensor) for name in native.VALUE_METRICS])
ValueMetrics.__doc__ = """Over the tokens that count, 0-dim float32, and `num_tokens`.

clip_fraction: share whose clipped error is the larger; value, return_: means; squared_error: mean,
not clipped; explained_variance: 1 - var(return - value) / var(return).
"""


class ValueLossOutput(NamedTuple):
    loss: Tensor
    """0-dim float32; differentiable in values."""
    metrics: ValueMetrics


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregate: str = "token-mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> ValueLossOutput:
    """Half the squared distance of values from returns, over the tokens that count.

    Equivalent to `0.5 * max((v - R)^2, (v.clamp(old - clip, old + clip) - R)^2)`, aggregated;
    without `clip`, to `0.5 * (v - R)^2`.

    Args:
        values: (B, T), or (N,) packed with `cu_seqlens`; any floating type, computed in float32.
        returns: like values, from `gae`.
        old_values: like values, those that the returns were computed from; needed for `clip`.
        clip: values count as at most this far from the old ones.
        mask: like values, bool, True where a token counts.
        aggregate, max_length, normalizer: as in `policy_loss`.

    Raises:
        ValueError: for shapes, devices or settings that do not fit.
    """
    _check(values, returns, old_values, clip, mask, cu_seqlens, aggregate)
    settings = dict(max_length=max_length, normalizer=normalizer)
    how = aggregation.plan(OP, aggregate, values, cu_seqlens, **settings)
    plain = sequences.plain
    args = (
        plain(values),
        plain(returns),
        plain(None if clip is None else old_values),
        plain(mask, torch.bool),
        sequences.offsets(cu_seqlens),
        0.0 if clip is None else float(clip),
        *how,
    )
    if values.requires_grad and torch.is_grad_enabled():
        loss, metrics = _ValueLoss.apply(values.float(), *args)
    else:
        loss, metrics, _ = torch.ops.rlhf_fast.value_loss(*args)
    return ValueLossOutput(loss, ValueMetrics(*metrics.unbind()))


def value_loss_ref(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregate: str = "token-mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the metrics by name, in plain PyTorch; in float64 if values are."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    max_length = max_length or values.shape[-1]
    given = [None if x is None else x.to(dtype) for x in (values, returns, old_values)]
    if cu_seqlens is not None:
        index, inside = sequences.padded(values, cu_seqlens)
        counts = counts[index] & inside
        given = [None if x is None else x[index] for x in given]
    v, target, old = (None if x is None else x.masked_fill(~counts, 0.0) for x in given)
    square = loss = (v - target).square()
    clipped = torch.zeros_like(square)
    if clip is not None:
        bounded = (torch.minimum(torch.maximum(v, old - clip), old + clip) - target).square()
        loss = torch.maximum(square, bounded)
        clipped = (bounded > square).to(dtype)

    def mean(x: Tensor) -> Tensor:
        return x.detach().masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)

    variance = mean(target.square()) - mean(target).square()
    left = mean(square) - mean(target - v).square()
    metrics = {
        "clip_fraction": mean(clipped),
        "value": mean(v),
        "return_": mean(target),
        "squared_error": mean(square),
        "explained_variance": torch.where(variance > 0, 1 - left / variance, 0.0),
        "num_tokens": counts.sum(),
    }
    return aggregation.aggregate_ref(loss / 2, counts, aggregate, max_length, normalizer), metrics


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, *args):
        loss, metrics, d_values = torch.ops.rlhf_fast.value_loss(*args)
        ctx.save_for_backward(d_values)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (d_values,) = ctx.saved_tensors
        return d_values * grad, *(None,) * 11


# ---- the op that torch's dispatcher knows --------------------------------------------------------

native.LIBRARY.define(
    "value_loss(Tensor values, Tensor returns, Tensor? old_values, Tensor? mask, "
    f"Tensor? cu_seqlens, float clip, {aggregation.SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


def _outputs(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    metrics = values.new_zeros(len(native.VALUE_METRICS))
    return values.new_zeros(()), metrics, torch.empty_like(values)


def _forward(values, returns, old_values, mask, cu_seqlens, clip, *how):
    sequences.check_offset_values(OP, cu_seqlens, values.numel())
    outputs = _outputs(values)
    if values.numel() == 0:
        return outputs
    count = sequences.num_sequences(values, cu_seqlens)
    lengths, partials = values.new_empty(count), values.new_empty(count, native.NUM_VALUE_SUMS)
    module, *where = native.target(values)
    module.value_loss(
        *where,
        sequences.pack(values, cu_seqlens),
        *map(native.address, (values, old_values, returns, mask)),
        clip,
        aggregation.pack(aggregation.Aggregation(*how)),
        *map(native.address, (*outputs, lengths, partials)),
    )
    return outputs


native.implement("value_loss", _forward)


@torch.library.register_fake("rlhf_fast::value_loss", lib=native.LIBRARY)
def _(values, *args):
    return _outputs(values)


# ---- checks --------------------------------------------------------------------------------------


def _check(values, returns, old_values, clip, mask, cu_seqlens, aggregate) -> None:
    sequences.check_tokens(OP, "values", values, cu_seqlens)
    sequences.check_like(OP, "returns", returns, values)
    sequences.check_like(OP, "old_values", old_values, values)
    sequences.check_mask(OP, mask, values)
    native.check(
        clip is None or (clip > 0 and math.isfinite(clip)),
        OP,
        "clip must be positive and finite",
        clip,
        "leave it out to switch it off",
    )
    native.check(
        clip is None or old_values is not None,
        OP,
        f"old_values must be given for clip={clip}",
        None,
        "values are clipped around them",
    )
    names = aggregation.AGGREGATIONS
    native.check(aggregate in names, OP, f"aggregate must be one of {names}", aggregate, "see it")
