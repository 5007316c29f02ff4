"""The clipped squared error of a value model: value, gradient and metrics in one call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import aggregation, autograd, native, sequences
from rlhf_fast.ops.metrics import Metrics

OP = "value_loss"


class ValueMetrics(Metrics):
    """Over the tokens that count, 0-dim float32, and `num_tokens`.

    clip_fraction: share whose clipped error is the larger; value, return_: means; squared_error:
    mean, not clipped; explained_variance: 1 - var(return - value) / var(return).
    """

    __slots__ = ()
    _fields = native.VALUE_METRICS


class ValueLossOutput(NamedTuple):
    loss: Tensor
    """0-dim float32; differentiable in values."""
    metrics: ValueMetrics


@native.takes_tensors
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
    how = aggregation.plan(
        OP, aggregate, values, cu_seqlens, max_length=max_length, normalizer=normalizer
    )
    plain = sequences.plain
    is_wanted = autograd.wants_gradient(values)
    loss, metrics, scale, d_values = _value_loss(
        plain(values),
        plain(returns),
        plain(None if clip is None else old_values),
        plain(mask, torch.bool),
        sequences.offsets(cu_seqlens),
        0.0 if clip is None else float(clip),
        *how,
        is_wanted,
    )
    if is_wanted:
        scale = native.scale_left(values, scale)
        loss = autograd.one_pass(loss, [values.float()], [d_values], scale)
    return ValueLossOutput(loss, ValueMetrics(metrics))


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


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _outputs(values: Tensor, *rest) -> tuple[Tensor, ...]:
    """The loss, the metrics, the gradient's scale, the gradient."""
    d_values = torch.empty_like(values) if rest[-1] else values.new_empty(0)
    metrics = values.new_empty(len(native.VALUE_METRICS))
    return values.new_empty(()), metrics, values.new_empty(()), d_values


def _forward(values, returns, old_values, mask, cu_seqlens, clip, *rest):
    *how, with_gradient = rest
    sequences.check_offset_values(OP, cu_seqlens, values.numel())
    outputs = loss, metrics, scale, d_values = _outputs(values, with_gradient)
    if values.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    count = sequences.num_sequences(values, cu_seqlens)
    lengths, partials = values.new_empty(count), values.new_empty(count, native.NUM_VALUE_SUMS)
    ticket = native.ticket(values)
    module, *where = native.target(values)
    module.value_loss(
        *where,
        sequences.pack(values, cu_seqlens),
        *map(native.address, (values, old_values, returns, mask)),
        clip,
        aggregation.pack(aggregation.Aggregation(*how)),
        *map(native.address, (loss, metrics)),
        d_values.data_ptr() if with_gradient else 0,
        *map(native.address, (lengths, partials, scale, ticket)),
    )
    return outputs


_value_loss = native.Op(
    "value_loss(Tensor values, Tensor returns, Tensor? old_values, Tensor? mask, "
    f"Tensor? cu_seqlens, float clip, {aggregation.SCHEMA}, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
)


# ---- checks --------------------------------------------------------------------------------------


def _check(values, returns, old_values, clip, mask, cu_seqlens, aggregate) -> None:
    sequences.check_tokens(OP, "values", values, cu_seqlens)
    sequences.check_like(OP, "returns", returns, values)
    sequences.check_like(OP, "old_values", old_values, values)
    sequences.check_mask(OP, mask, values)
    if clip is not None and not 0 < clip < math.inf:
        must = "clip must be positive and finite"
        native.refuse(OP, must, clip, "leave it out to switch it off")
    if clip is not None and old_values is None:
        must = f"old_values must be given for clip={clip}"
        native.refuse(OP, must, None, "values are clipped around them")
    if aggregate not in aggregation.AGGREGATIONS:
        must = f"aggregate must be one of {aggregation.AGGREGATIONS}"
        native.refuse(OP, must, aggregate, "see it")
