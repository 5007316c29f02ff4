"""Masked whitening, also across processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences


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
        statistics = torch.ops.rlhf_fast.whiten_statistics(values, mask)
    return torch.ops.rlhf_fast.whiten_apply(
        values, mask, statistics, float(epsilon), unbiased, shift_mean
    )


def whiten_statistics(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of the values that count: (3,) float64.

    To whiten over several processes, `all_reduce` the sum of these and hand it to `whiten`.
    """
    _check(values, mask, None, 0.0)
    values, mask = sequences.plain(values), sequences.plain(mask, torch.bool)
    return torch.ops.rlhf_fast.whiten_statistics(values, mask)


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

native.LIBRARY.define("whiten_statistics(Tensor values, Tensor? mask) -> Tensor")
native.LIBRARY.define(
    "whiten_apply(Tensor values, Tensor? mask, Tensor statistics, float epsilon, bool unbiased, "
    "bool shift_mean) -> Tensor"
)


def _statistics(values, mask):
    module, *where = native.target(values)
    num_partials = -(-values.numel() // module.WHITEN_CHUNK)
    scratch = values.new_zeros(1 + num_partials, 3, dtype=torch.float64)
    inputs = (values.data_ptr(), native.address(mask), values.numel())
    module.whiten_statistics(*where, *inputs, scratch[0].data_ptr(), scratch[1:].data_ptr())
    return scratch[0].clone()


def _apply(values, mask, statistics, *settings):
    whitened = torch.empty_like(values)
    module, *where = native.target(values)
    inputs = (values.data_ptr(), native.address(mask), values.numel())
    module.whiten_apply(*where, *inputs, whitened.data_ptr(), statistics.data_ptr(), *settings)
    return whitened


native.implement("whiten_statistics", _statistics)
native.implement("whiten_apply", _apply)


@torch.library.register_fake("rlhf_fast::whiten_statistics", lib=native.LIBRARY)
def _(values, mask):
    return values.new_empty(3, dtype=torch.float64)


@torch.library.register_fake("rlhf_fast::whiten_apply", lib=native.LIBRARY)
def _(values, *args):
    return torch.empty_like(values)


# ---- checks --------------------------------------------------------------------------------------


def _check(values, mask, statistics, epsilon) -> None:
    op = "whiten"
    native.check(
        values.dtype in sequences.FLOATS,
        op,
        "values must be of a floating-point type",
        values.dtype,
        "convert them",
    )
    sequences.check_mask(op, mask, values)
    native.check(
        math.isfinite(epsilon) and epsilon >= 0,
        op,
        "epsilon must be finite and not negative",
        epsilon,
        "it is added to the variance",
    )
    native.check(
        statistics is None
        or (
            statistics.shape == (3,)
            and statistics.dtype == torch.float64
            and statistics.device == values.device
        ),
        op,
        f"statistics must be float64 of shape (3,) on {values.device}",
        None if statistics is None else f"{statistics.dtype} {tuple(statistics.shape)}",
        "take them from whiten_statistics",
    )
