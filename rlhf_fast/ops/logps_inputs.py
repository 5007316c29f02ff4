"""Checks of what goes into `logps`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import native
from rlhf_fast.ops.logps_ref import OUTPUTS

MAX_LABELS_PER_ROW = 512


def check_inputs(logits, labels, temperature, softcap, logit_scale, outputs) -> Tensor | None:
    """Refuses what does not fit; returns temperatures as one float32 per row, if they vary."""
    op, shape = "logps", tuple(logits.shape)
    native.check_rows(op, "logits", logits)
    native.check(
        labels.dtype in (torch.int32, torch.int64),
        op,
        "labels must be int32 or int64",
        labels.dtype,
        "convert them with labels.long()",
    )
    many = labels.dim() == logits.dim()
    native.check(
        labels.shape[: logits.dim() - 1] == logits.shape[:-1] and labels.dim() <= logits.dim(),
        op,
        f"labels must have shape {shape[:-1]} or {(*shape[:-1], 'K')} for logits {shape}",
        tuple(labels.shape),
        "shift or reshape the labels to match",
    )
    native.check(
        not many or 1 <= labels.shape[-1] <= MAX_LABELS_PER_ROW,
        op,
        f"there must be 1 to {MAX_LABELS_PER_ROW} labels per row",
        tuple(labels.shape),
        "split them over several calls",
    )
    native.check(
        labels.device == logits.device,
        op,
        f"labels must be on the logits' device {logits.device}",
        labels.device,
        "move them",
    )
    check_settings(op, softcap, logit_scale, outputs)
    return temperature_per_row(op, temperature, logits.shape[:-1], logits.device)


def check_settings(op, softcap, logit_scale, outputs) -> None:
    native.check(
        len(outputs) > 0 and len(set(outputs)) == len(outputs) and set(outputs) <= set(OUTPUTS),
        op,
        f"outputs must name some of {OUTPUTS}, each once",
        tuple(outputs),
        "see LogpsOutput",
    )
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        native.check(
            value is None or (value > 0 and math.isfinite(value)),
            op,
            f"{name} must be positive and finite",
            value,
            "leave it out to switch it off",
        )


def temperature_per_row(op, temperature, shape, device) -> Tensor | None:
    """Temperatures as one float32 per row; None for a number, which holds for all."""
    if not isinstance(temperature, Tensor):
        native.check(
            temperature > 0 and math.isfinite(temperature),
            op,
            "temperature must be positive and finite",
            temperature,
            "greedy decoding has no log-probs; use the temperature that the trainer assumes",
        )
        return None
    native.check(
        not temperature.requires_grad and temperature.device == device,
        op,
        f"temperatures must be constants on {device}",
        f"requires_grad={temperature.requires_grad} on {temperature.device}",
        "detach or move them",
    )
    try:
        expanded = temperature.expand(shape)
    except RuntimeError:
        expanded = None
    native.check(
        expanded is not None,
        op,
        f"temperatures must be one number or have shape {tuple(shape)}",
        tuple(temperature.shape),
        "give one value per row",
    )
    return expanded.float().contiguous()


def overlaps_itself(logits: Tensor) -> bool:
    rows = zip(logits.shape[:-1], logits.stride()[:-1])
    return any(n > 1 and stride < logits.shape[-1] for n, stride in rows)


def check_values(logits, labels, row_temperatures, ignore_index) -> None:
    good = (labels == ignore_index) | ((labels >= 0) & (labels < logits.shape[-1]))
    native.check(
        bool(good.all()),
        "logps",
        f"labels must lie in [0, {logits.shape[-1]}) or be {ignore_index} (ignored)",
        labels[~good][:4].tolist(),
        "check that labels and logits come from the same tokenizer and model",
    )
    native.check(
        row_temperatures is None or bool((row_temperatures > 0).all()),
        "logps",
        "temperatures must be positive",
        "one that is not",
        "use the temperature that the trainer assumes",
    )
