"""Masked whitening, also across processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences


@native.takes_tensors
def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    epsilon: float = 1e-8,
    statistics: Tensor | None = None,
) -> Tensor:
    """Values shifted and scaled to mean 0 and variance 1 over the tokens that count.

    Equivalent to `x = values[mask]; (x - x.mean()) * (x.var() + epsilon).rsqrt()` at these tokens
    and 0 elsewhere; sums are in float64. With fewer than two tokens nothing is scaled but by
    `epsilon`: no variance is made up.

    Args:
        values: of any shape and floating type; the result is float32 and carries no gradient.
        mask: like values, bool, True where a value counts.
        shift_mean: False keeps the mean.
        unbiased: the variance divides by the count minus 1 (verl); False: by the count (OpenRLHF).
        statistics: from `whiten_statistics`, added up over the processes that whiten together.

    Raises:
        ValueError: for shapes, dtypes, devices or settings that do not fit.
    """
    _check(values, mask, statistics, epsilon)
    values, mask = sequences.plain(values), sequences.plain(mask, torch.bool)
    if statistics is None:
        statistics = _whiten_statistics(values, mask)
    return _whiten(values, mask, statistics, float(epsilon), unbiased, shift_mean)


@native.takes_tensors
def whiten_statistics(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of the values that count: (3,) float64.

    To whiten over several processes, `all_reduce` the sum of these and hand it to `whiten`.
    """
    _check(values, mask, None, 0.0)
    values, mask = sequences.plain(values), sequences.plain(mask, torch.bool)
    return _whiten_statistics(values, mask)


def whiten_ref(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    epsilon: float = 1e-8,
) -> Tensor:
    """What `whiten` computes, in plain PyTorch; in float64 if the values are."""
    x = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = x.masked_fill(~mask, 0.0)
    count = mask.sum()
    mean = x.sum() / count.clamp(min=1)
    squares = (x - mean).masked_fill(~mask, 0.0).square().sum()
    variance = squares / (count - int(unbiased)).clamp(min=1)
    whitened = (x - mean) * (variance + epsilon).rsqrt() + (0.0 if shift_mean else mean)
    return whitened.masked_fill(~mask, 0.0)


# ---- the ops that torch's dispatcher knows -------------------------------------------------------


def _statistics(values, mask):
    module, *where = native.target(values)
    statistics = values.new_empty(3, dtype=torch.float64)
    num_chunks = max(-(-values.numel() // module.WHITEN_CHUNK), 1)
    partials = values.new_empty(num_chunks, 3, dtype=torch.float64)
    inputs = (values.data_ptr(), native.address(mask), values.numel())
    outputs = statistics, partials, native.ticket(values)
    module.whiten_statistics(*where, *inputs, *map(native.address, outputs))
    return statistics


def _apply(values, mask, statistics, *settings):
    whitened = torch.empty_like(values)
    module, *where = native.target(values)
    inputs = (values.data_ptr(), native.address(mask), values.numel())
    module.whiten_apply(*where, *inputs, whitened.data_ptr(), statistics.data_ptr(), *settings)
    return whitened


_whiten_statistics = native.Op(
    "whiten_statistics(Tensor values, Tensor? mask) -> Tensor",
    _statistics,
    lambda values, mask: values.new_empty(3, dtype=torch.float64),
)
_whiten = native.Op(
    "whiten_apply(Tensor values, Tensor? mask, Tensor statistics, float epsilon, bool unbiased, "
    "bool shift_mean) -> Tensor",
    _apply,
    lambda values, *args: torch.empty_like(values),
)


# ---- checks --------------------------------------------------------------------------------------


def _check(values, mask, statistics, epsilon) -> None:
    op = "whiten"
    if values.dtype not in sequences.FLOATS:
        must = "values must be of a floating-point type"
        native.refuse(op, must, values.dtype, "convert them")
    sequences.check_mask(op, mask, values)
    if not 0 <= epsilon < math.inf:
        must = "epsilon must be finite and not negative"
        native.refuse(op, must, epsilon, "it is added to the variance")
    if statistics is None:
        return
    fits = statistics.shape == (3,) and statistics.dtype == torch.float64
    if not fits or statistics.device != values.device:
        must = f"statistics must be float64 of shape (3,) on {values.device}"
        got = f"{statistics.dtype} {tuple(statistics.shape)} on {statistics.device}"
        native.refuse(op, must, got, "take them from whiten_statistics")
