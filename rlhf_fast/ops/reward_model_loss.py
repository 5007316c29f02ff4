"""Losses of reward models: pairs of rewards, and heads that predict ratings or quantiles."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.ops import autograd, native, sequences
from rlhf_fast.ops.preference_inputs import (
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
)
from rlhf_fast.ops.preference_loss import preference_loss
from rlhf_fast.ops.preference_ref import preference_loss_ref

REWARD_LOSSES = tuple(native.table("REWARD_LOSSES"))
REDUCTIONS = ("mean", "sum", "none")


@native.takes_tensors
def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    targets: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_weight: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """Bradley-Terry loss of pairs of rewards, with gradient and accuracy from one kernel.

    Equivalent to `-logsigmoid(chosen - rejected - margins).mean() + center_weight * (chosen +
    rejected).square().mean()`, as TRL's RewardTrainer has it.

    Args:
        chosen_rewards: [B], float32, float16 or bfloat16.
        rejected_rewards: [B].
        margins: [B], by how much the chosen reward should exceed the other (arXiv 2307.09288).
        targets: [B] in [0, 1], probability that the chosen one is better: soft labels, such as
            those that `losses.smooth_labels` keeps (arXiv 2401.16335); 1 if left out.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        center_weight: pulls the rewards' sum to 0 (arXiv 2312.09244, equation 2).
        reduction: "mean" divides by the number of pairs.

    Raises:
        ValueError: as `preference_loss`, which this is with loss_type "bradley_terry", beta 1.
    """
    return preference_loss(
        chosen_rewards,
        rejected_rewards,
        loss_type="bradley_terry",
        beta=1.0,
        params=_params(label_smoothing, center_weight),
        data=PairData(margins=margins, targets=targets),
        reduction=reduction,
    )


def reward_model_loss_ref(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    targets: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_weight: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """What `reward_model_loss` computes, in plain PyTorch; float64 stays float64."""
    return preference_loss_ref(
        chosen_rewards,
        rejected_rewards,
        loss_type="bradley_terry",
        beta=1.0,
        params=_params(label_smoothing, center_weight),
        data=PairData(margins=margins, targets=targets),
        reduction=reduction,
    )


@native.remembered
def _params(label_smoothing, center_weight) -> PreferenceParams:
    return PreferenceParams(label_smoothing=label_smoothing, center_weight=center_weight)


@native.takes_tensors
def reward_regression_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    loss_type: str = "squared",
    levels: Tensor | None = None,
    delta: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Loss of reward heads against ratings: squared, huber, quantile (pinball) or binary.

    Equivalent to `F.mse_loss(predictions, targets, reduction="none")[mask].mean()` for squared, and
    likewise for the others, with the gradient from the same kernel.

    Args:
        predictions: [B, K], one column per head, float32, float16 or bfloat16.
        targets: [B, K] constants, or [B] for all heads (quantiles of one rating).
        mask: bool [B, K], True where the rating is known; what it leaves out is not looked at and
            may be NaN.
        levels: [K] in (0, 1), the quantile that each head predicts; for "quantile".
        delta: where the Huber loss turns linear; for "huber".
        reduction: "mean" divides by the number of known ratings, or gives 0 without any; "none"
            gives [B, K].

    Raises:
        ValueError: for shapes, dtypes and devices that do not fit, and on the CPU for levels
            outside (0, 1).

    Source: multi-objective heads, arXiv 2406.12845; quantiles, arXiv 2409.10164.
    """
    _check(predictions, targets, mask, loss_type, levels, delta, reduction)
    losses, loss, gradients = _reward_regression_loss(
        sequences.plain(predictions),
        sequences.plain(targets),
        None if mask is None else mask.contiguous(),
        sequences.plain(levels),
        loss_type,
        delta,
        reduction == "mean",
    )
    if reduction == "none":
        loss = losses
    if autograd.wants_gradient(predictions):
        loss = autograd.one_pass(loss, [predictions.float()], [gradients])
    return loss


def reward_regression_loss_ref(
    predictions: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    loss_type: str = "squared",
    levels: Tensor | None = None,
    delta: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """What `reward_regression_loss` computes, in plain PyTorch; float64 stays float64."""
    x = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    y = (targets if targets.dim() == 2 else targets[:, None]).to(x.dtype).expand(x.shape)
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x, y = x.masked_fill(~mask, 0.0), y.masked_fill(~mask, 0.0)
    if loss_type == "squared":
        losses = (x - y).square()
    elif loss_type == "huber":
        losses = F.huber_loss(x, y, reduction="none", delta=delta)
    elif loss_type == "binary":
        losses = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    else:
        tau = levels.to(x.dtype)
        losses = torch.maximum(tau * (y - x), (tau - 1) * (y - x))
    losses = losses.masked_fill(~mask, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (mask.sum().clamp(min=1) if reduction == "mean" else 1)


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _empty_outputs(predictions, *args):
    shapes = (predictions.shape, (), predictions.shape)
    return tuple(predictions.new_empty(shape) for shape in shapes)


def _forward(predictions, targets, mask, levels, loss_type, delta, mean):
    losses, total, grads = outputs = _empty_outputs(predictions)
    if predictions.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    predictions = predictions.contiguous()
    module, *where = native.target(predictions)
    module.reward_model_loss(
        *where,
        REWARD_LOSSES.index(loss_type),
        *predictions.shape,
        *map(native.address, (predictions, targets)),
        targets.dim() == 1,
        *map(native.address, (mask, levels)),
        delta,
        mean,
        *map(native.address, (losses, grads, total)),
    )
    return outputs


_reward_regression_loss = native.Op(
    "reward_regression_loss_forward(Tensor predictions, Tensor targets, Tensor? mask, "
    "Tensor? levels, str loss_type, float delta, bool mean) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
)


# ---- checks --------------------------------------------------------------------------------------


def _check(predictions, targets, mask, loss_type, levels, delta, reduction) -> None:
    op = "reward_regression_loss"
    if predictions.dim() != 2 or predictions.dtype not in native.DTYPES:
        got = f"{predictions.dtype} {tuple(predictions.shape)}"
        must = "predictions must have shape [B, K]"
        native.check(predictions.dim() == 2, op, must, got, "one column per head")
        must = "predictions must be float32, float16 or bfloat16"
        native.refuse(op, must, got, "convert them, or use reward_regression_loss_ref")
    _check_choices(loss_type, reduction, delta, levels is not None)
    shape = predictions.shape
    of_responses = targets.dim() == 1
    sequences.check_like(op, "targets", targets, predictions, shape[:1] if of_responses else shape)
    sequences.check_mask(op, mask, predictions)
    if levels is not None:
        sequences.check_like(op, "levels", levels, predictions, shape[1:])
        native.check(
            (levels.is_cuda and not native.debug()) or bool(((levels > 0) & (levels < 1)).all()),
            op,
            "levels must lie in (0, 1)",
            levels.tolist() if levels.numel() <= 9 else "some that do not",
            "0.5 is the median",
        )


@native.remembered
def _check_choices(loss_type, reduction, delta, with_levels) -> None:
    def must(condition, must, got, advice):
        native.check(condition, "reward_regression_loss", must, got, advice)

    for name, value, known in (
        ("loss_type", loss_type, REWARD_LOSSES),
        ("reduction", reduction, REDUCTIONS),
    ):
        must(value in known, f"{name} must be one of {known}", repr(value), "choose one")
    must(
        with_levels == (loss_type == "quantile"),
        f"levels must be {'given' if loss_type == 'quantile' else 'left out'} for {loss_type!r}",
        "a tensor" if with_levels else None,
        "they are the heads' quantiles",
    )
    must(0 < delta < math.inf, "delta must be positive and finite", delta, "try 1.0")
