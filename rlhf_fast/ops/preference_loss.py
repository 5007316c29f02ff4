"""Losses of preference pairs from sequence log-probs, with gradients and rewards in one call."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, native
from rlhf_fast.ops.preference_inputs import (
    DEFAULT_PARAMS,
    NO_DATA,
    PREFERENCE_LOSSES,
    TRAITS,
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
    check,
    check_settings,
)
from rlhf_fast.ops.preference_ref import paired_details, sorting_orders


@native.takes_tensors
def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    params: PreferenceParams = DEFAULT_PARAMS,
    data: PairData = NO_DATA,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """Loss of preference pairs, its gradient and the implicit rewards, from one kernel.

    For `sigmoid` equivalent to `-logsigmoid(beta * ((chosen_logps - ref_chosen_logps) -
    (rejected_logps - ref_rejected_logps))).mean()`; `PREFERENCE_LOSSES` names the others, and
    csrc/math/preference.h gives formula and source of each. Names and values are those of TRL's
    DPOTrainer where it has them, except that `sigmoid` here takes label smoothing.

    Args:
        chosen_logps: [B] sums of log-probs over response tokens, float32, float16 or bfloat16,
            computed in float32 at least; strided halves of a batch are read where they lie.
        rejected_logps: [B], of the other responses.
        ref_chosen_logps: [B] under the reference, constants; left out for cpo, simpo, slic, orpo,
            sft and bradley_terry, which have none.
        ref_rejected_logps: [B].
        loss_type: one of `PREFERENCE_LOSSES`. aot and aot_unpaired sort the batch first; with
            reduction "none" their losses come in that order.
        beta: strength of the tie to the reference, or scale of the score; > 0.
        params: settings of single losses.
        data: lengths (which ipo, sigmoid_norm, simpo, orpo, sft and the NLL term need), weights,
            margins and soft labels per pair.
        reduction: "mean" divides by the number of pairs, whatever their weights.

    Raises:
        ValueError: for shapes, devices and settings that do not fit, and on the CPU for targets
            outside [0, 1], negative weights or lengths, NaN in any of these. NaN log-probs
            give a NaN loss.
    """
    return _run(
        (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps),
        None,
        (loss_type, beta, params, data, reduction),
    )


@native.takes_tensors
def unpaired_preference_loss(
    logps: Tensor,
    is_chosen: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    params: PreferenceParams = DEFAULT_PARAMS,
    data: PairData = NO_DATA,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """Loss of single responses labelled good or bad: kto, bco_pair, apo_zero, nca_pair, sppo_hard.

    Equivalent to the chosen part of that `preference_loss` where `is_chosen`, else the rejected
    part. logps, ref_logps: [B]; is_chosen: bool [B]; the rest as for `preference_loss`.

    Source: KTO, arXiv 2402.01306, equation 7; BCO, arXiv 2404.04656.
    """
    return _run(
        (logps, None, ref_logps, None),
        is_chosen,
        (loss_type, beta, params, data, reduction),
    )


def _run(logps, is_chosen, settings) -> PreferenceLossOutput:
    loss_type, beta, params, data, reduction = settings
    numbers = check_settings(
        loss_type,
        beta,
        params,
        reduction,
        is_chosen is not None,
        tuple(t is not None for t in logps[2:]),
        tuple(t is not None for t in data),
    )
    check(logps, is_chosen, data)
    chosen, rejected, *references = (None if t is None else t.float() for t in logps)
    if loss_type == "sft":  # so that the mean over pairs is the mean over all their tokens
        mean = data.chosen_lengths.float().clamp(min=1).mean().expand(chosen.shape)
        data = data._replace(chosen_lengths=mean, rejected_lengths=mean)
    is_sorted = "sorted" in TRAITS[loss_type]
    if is_sorted:
        orders = sorting_orders(loss_type, chosen, rejected, *references)
        chosen, rejected, *references = (
            t[order] for t, order in zip((chosen, rejected, *references), orders)
        )
    chosen_values, rejected_values, *constants = map(values, (chosen, rejected, *references, *data))
    scale = 1.0 / max(len(chosen), 1) if reduction == "mean" else 1.0
    rows, loss, means = _preference_loss(
        chosen_values,
        rejected_values,
        constants,
        is_chosen,
        loss_type,
        numbers,
        scale,
    )
    losses, *rows = rows.unbind()
    details, gradients = rows[:4], rows[4:]
    is_wanted = autograd.wants_gradient(chosen, rejected)
    if reduction == "none":
        loss = losses.clone() if is_wanted else losses
    if is_wanted:
        inputs = (chosen,) if rejected is None else (chosen, rejected)
        loss = autograd.one_pass(loss, inputs, gradients)
    if is_sorted:  # the kernel saw other pairs
        details, means = paired_details(beta, *(t.detach().float() for t in logps))
    return PreferenceLossOutput(loss, *details, means)


def values(tensor: Tensor | None) -> Tensor | None:
    """float32 without gradient; at any stride, which the kernel reads as it is."""
    if tensor is None or (tensor.dtype == torch.float32 and not tensor.requires_grad):
        return tensor
    return tensor.detach().float()


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _outputs(chosen, rejected, *args):
    """Rows of losses, four details and the gradients; the loss; the details' means."""
    rows = chosen.new_empty(6 if rejected is None else 7, len(chosen))
    return rows, chosen.new_empty(()), chosen.new_empty(4)


def _forward(chosen, rejected, constants, is_chosen, loss_type, settings, scale):
    outputs = _outputs(chosen, rejected)
    count = len(chosen)
    if count == 0:
        return tuple(t.zero_() for t in outputs)
    is_chosen = None if is_chosen is None else is_chosen.contiguous()
    module, *where = native.target(chosen)
    pairs = pack(count, loss_type, settings, (chosen, rejected, *constants), is_chosen, scale)
    module.preference_loss(*where, pairs, addresses(*outputs))
    return outputs


def pack(count, loss_type, settings, tensors, is_chosen, scale) -> tuple:
    """A batch of pairs as the bindings take it; `tensors` end with the baseline."""
    *columns, baseline = tensors
    return (
        count,
        (PREFERENCE_LOSSES.index(loss_type), int(settings[0]), *settings[1:]),
        tuple(map(native.column, columns)),
        native.address(baseline),
        native.address(is_chosen),
        scale,
    )


def addresses(rows, loss, means) -> tuple[int, ...]:
    """Of losses, gradients and details, which are rows of one tensor; loss and means."""
    first, row = rows.data_ptr(), 4 * rows.shape[1]  # bytes
    return first, first + 5 * row, first + row, loss.data_ptr(), means.data_ptr()


# constants: ref_chosen, ref_rejected, then the fields of PairData
_preference_loss = native.Op(
    "preference_loss_forward(Tensor chosen, Tensor? rejected, Tensor?[] constants, "
    "Tensor? is_chosen, str loss_type, float[] settings, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
)
