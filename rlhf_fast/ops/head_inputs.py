"""What the fused heads do with their arguments before the work: check, gather, drop dead rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_fast.ops import autograd, native, one_node
from rlhf_fast.ops.logps_inputs import check_settings, temperature_per_row

IGNORED = -100  # whatever the caller's ignored label is


@dataclass(frozen=True)
class HeadSettings:
    """How logits follow from the product, and which label does not count."""

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100
    logits_dtype: torch.dtype | None = None
    """torch.float32: logits of 16-bit hidden states and weights are not rounded to 16 bits."""

    def numbers(self) -> list[float]:
        """All but a temperature per row."""
        temperature = 1.0 if isinstance(self.temperature, Tensor) else self.temperature
        rest = one_node.number(self.softcap), self.logit_scale, float(self.ignore_index)
        return [temperature, *rest, float(self.logits_dtype is not None)]

    def row_temperatures(self) -> Tensor | None:
        return self.temperature if isinstance(self.temperature, Tensor) else None

    @classmethod
    def from_numbers(cls, numbers: list[float], row_temperatures: Tensor | None) -> HeadSettings:
        temperature, softcap, scale, ignored, unrounded = numbers
        return cls(
            temperature if row_temperatures is None else row_temperatures,
            one_node.optional(softcap),
            scale,
            int(ignored),
            torch.float32 if unrounded else None,
        )


DEFAULT_SETTINGS = HeadSettings()


@dataclass(frozen=True)
class HeadInputs:
    """The live rows of a call, flat."""

    hidden: Tensor
    """(N, D), in the dtype to compute in."""
    weight: Tensor
    """(V, D), in its own dtype, so that its gradient is not rounded to another."""
    bias: Tensor | None
    labels: Tensor
    """(N,) int64."""
    row_temperatures: Tensor | None
    scalars: tuple[float, float, float]
    """temperature, softcap, logit_scale"""
    logits_dtype: torch.dtype
    shape: torch.Size
    """Of the labels as they came."""
    index: Tensor | None
    """Which of these are live; None: all."""

    def live_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """Offsets into all rows as offsets into the live ones."""
        if self.index is None:
            return cu_seqlens.long()
        return torch.searchsorted(self.index, cu_seqlens.long())

    def gather(self, per_row: Tensor) -> Tensor:
        """The live ones of values shaped like the labels, flat."""
        flat = per_row.expand(self.shape).reshape(-1)
        return flat if self.index is None else flat[self.index]

    def gather_rows(self, hidden: Tensor) -> Tensor:
        """The live rows of other hidden states of the same positions, in the dtype of ours."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(self.hidden.dtype)
        return rows if self.index is None else rows[self.index]

    def scatter_rows(self, rows: Tensor) -> Tensor:
        """Hidden states' gradient of live rows as that of all, flat, 0 elsewhere."""
        if self.index is None:
            return rows
        zeros = rows.new_zeros(self.shape.numel(), rows.shape[-1])
        return zeros.index_copy(0, self.index, rows)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of live rows, shaped like the labels, with 0 elsewhere."""
        if self.index is None:
            return values.view(self.shape)
        zeros = values.new_zeros(self.shape.numel())
        return zeros.index_copy(0, self.index, values).view(self.shape)


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: HeadSettings,
    outputs: tuple[str, ...] = ("logps",),
) -> HeadInputs:
    check_settings(op, settings.softcap, settings.logit_scale, outputs)
    native.check(
        settings.logits_dtype in (None, torch.float32),
        op,
        "logits_dtype must be torch.float32 or None",
        settings.logits_dtype,
        "None takes that of the hidden states",
    )
    weight, bias = _gathered(weight), _gathered(bias)
    # Or autograd.Function would still see inputs that need a gradient.
    if not autograd.wants_gradient(hidden, weight, bias):
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    _check(op, hidden, weight, labels, bias, mask)
    temperatures = temperature_per_row(op, settings.temperature, labels.shape, labels.device)
    live = labels.reshape(-1) != settings.ignore_index
    if mask is not None:
        live = live & mask.reshape(-1)
    capturing = live.is_cuda and torch.cuda.is_current_stream_capturing()
    index = None if capturing else live.nonzero()[:, 0]
    index = None if index is None or len(index) == len(live) else index
    flat = labels.reshape(-1).long().contiguous()
    rows = hidden.reshape(-1, hidden.shape[-1])
    if index is not None:
        rows, flat = rows[index], flat[index]
        temperatures = None if temperatures is None else temperatures.reshape(-1)[index]
    elif capturing:  # the number of rows is fixed, so dead ones are computed and ignored
        flat = flat.masked_fill(~live, IGNORED)
    _check_labels(op, flat, weight.shape[0])
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        rows = rows.to(torch.get_autocast_dtype(device_type))
    return HeadInputs(
        rows.contiguous(),
        weight,
        bias,
        flat,
        None if temperatures is None else temperatures.reshape(-1),
        (
            1.0 if temperatures is not None else float(settings.temperature),
            float(settings.softcap or 0.0),
            float(settings.logit_scale),
        ),
        settings.logits_dtype or rows.dtype,
        labels.shape,
        index,
    )


def outside_of_node(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What compiled code does before it calls a node, in which autocast is off: cast and gather."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return hidden, _gathered(weight), _gathered(bias)


def _gathered(tensor: Tensor | None) -> Tensor | None:
    """A DTensor as the whole tensor it is; every rank's gradient is then a part of the sum."""
    if type(tensor) in (type(None), Tensor, nn.Parameter) or not torch.distributed.is_available():
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(tensor, DTensor):  # hasattr(tensor, "full_tensor") is False when compiling
        return tensor
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def _check(op, hidden, weight, labels, bias, mask) -> None:
    native.check(
        hidden.dtype in native.DTYPES and weight.is_floating_point(),
        op,
        "hidden and weight must be float32, float16 or bfloat16",
        f"{hidden.dtype} and {weight.dtype}",
        "convert them first",
    )
    native.check(
        hidden.dim() >= 1 and weight.dim() == 2 and 0 not in weight.shape,
        op,
        "hidden must have shape (..., D) and weight (V, D)",
        f"{tuple(hidden.shape)} and {tuple(weight.shape)}",
        "gather a partitioned weight first",
    )
    native.check(
        hidden.shape[-1] == weight.shape[1],
        op,
        f"hidden must have shape (..., {weight.shape[1]}) for weight {tuple(weight.shape)}",
        tuple(hidden.shape),
        "pass the hidden states that this head follows",
    )
    native.check(
        labels.dtype in (torch.int32, torch.int64) and labels.shape == hidden.shape[:-1],
        op,
        f"labels must be int32 or int64 of shape {tuple(hidden.shape[:-1])}",
        f"{labels.dtype} {tuple(labels.shape)}",
        "shift or reshape the labels to match",
    )
    native.check(
        bias is None or bias.shape == weight.shape[:1],
        op,
        f"bias must have shape ({weight.shape[0]},)",
        None if bias is None else tuple(bias.shape),
        "pass the bias of the same head",
    )
    native.check(
        mask is None or (mask.dtype == torch.bool and mask.shape == labels.shape),
        op,
        f"mask must be bool of shape {tuple(labels.shape)}",
        None if mask is None else f"{mask.dtype} {tuple(mask.shape)}",
        "True marks the rows that count",
    )
    devices = {t.device for t in (hidden, weight, labels, bias, mask) if t is not None}
    native.check(
        len(devices) == 1,
        op,
        "all tensors must be on one device",
        sorted(map(str, devices)),
        "move them",
    )


def _check_labels(op: str, labels: Tensor, vocab_size: int) -> None:
    if labels.is_cuda and not native.debug():
        return
    bad = (labels >= vocab_size) | ((labels < 0) & (labels != IGNORED))
    native.check(
        not bool(bad.any()),
        op,
        f"labels must lie in [0, {vocab_size}) or be ignored",
        labels[bad][:4].tolist(),
        "check that labels and head come from the same tokenizer and model",
    )


def head_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear head; refuses one whose output is not just these.

    Raises:
        ValueError: for a module that is no `nn.Linear`, or that an adapter (LoRA) wraps: the fused
            head would ignore the adapter.
    """
    native.check(
        isinstance(module, nn.Linear) and not hasattr(module, "base_layer"),
        "head_weight",
        "the head must be a plain torch.nn.Linear",
        type(module).__module__ + "." + type(module).__qualname__,
        "leave the output embedding out of the adapter's target modules, or merge the adapter",
    )
    return module.weight, module.bias
