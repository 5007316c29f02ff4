"""The ops behind `logps` that torch's dispatcher knows, and their calls of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.memory import on_huge_pages
from rlhf_fast.ops import native
from rlhf_fast.ops.logps_inputs import check_values
from rlhf_fast.ops.logps_ref import OUTPUTS

INTERNAL = ("reference", "log_sum")  # lse in two parts, kept for backward
ALL = (*OUTPUTS, *INTERNAL)
KERNEL_ORDER = ("lse", "logps", "entropy", "sum_p2", "mean_logit", "is_top1")

_INPUTS = (
    "Tensor labels, Tensor? row_temperatures, float temperature, float softcap, "
    "float logit_scale, int ignore_index"
)
_GRADS = (
    "Tensor reference, Tensor log_sum, Tensor? entropy, "
    "Tensor? grad_logps, Tensor? grad_entropy, Tensor? grad_lse"
)
_OPTIONS = "*, Tensor? row_thresholds=None"
native.LIBRARY.define(
    f"logps_forward(Tensor logits, {_INPUTS}, str[] outputs, {_OPTIONS}) -> Tensor[]"
)
native.LIBRARY.define(f"logps_backward(Tensor logits, {_INPUTS}, {_GRADS}, {_OPTIONS}) -> Tensor")
native.LIBRARY.define(f"logps_backward_(Tensor(a!) logits, {_INPUTS}, {_GRADS}, {_OPTIONS}) -> ()")
native.LIBRARY.define(
    # Functionalisation takes no list from an op that mutates: all outputs, some of them empty.
    f"logps_with_grad_(Tensor(a!) logits, {_INPUTS}, str[] outputs, Tensor? grad_logps, "
    f"Tensor? grad_entropy, Tensor? grad_lse) -> ({', '.join(['Tensor'] * len(ALL))})"
)


def _empty_outputs(logits: Tensor, labels: Tensor, outputs: list[str]) -> dict[str, Tensor]:
    shapes = {"logps": labels.shape, "is_top1": labels.shape}
    return {
        name: logits.new_empty(
            shapes.get(name, logits.shape[:-1]),
            dtype=torch.bool if name == "is_top1" else torch.float32,
        )
        for name in outputs
    }


def _inputs(
    logits,
    labels,
    row_temperatures,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    row_thresholds,
):
    return (
        native.rows(logits),
        labels.data_ptr(),
        labels.dtype == torch.int32,
        labels.shape[-1] if labels.dim() == logits.dim() else 1,
        ignore_index,
        logit_scale,
        softcap,
        temperature,
        native.address(row_temperatures),
        native.address(row_thresholds),
    )


def _forward(logits, labels, *args, row_thresholds=None):
    *settings, outputs = args
    results = _empty_outputs(logits, labels, outputs)
    if labels.numel() == 0:
        return list(results.values())
    if logits.is_cuda and native.debug():
        check_values(logits, labels, settings[0], settings[-1])
    named = _empty_outputs(logits, labels, list(INTERNAL)) | results
    module, *where = native.target(logits)
    module.logps_forward(
        *where,
        *_inputs(logits, labels, *settings, row_thresholds),
        *(native.address(named.get(name)) for name in (*INTERNAL, *KERNEL_ORDER)),
    )
    return list(results.values())


def _backward_into(
    grad_logits: Tensor, logits: Tensor, labels: Tensor, *args, row_thresholds=None
) -> None:
    if labels.numel() == 0:
        grad_logits.zero_()
        return
    settings = args[:5]
    # Upstream gradients are as small as the labels; an expanded one (from a sum) gets its storage.
    kept = [None if t is None else t.float().contiguous() for t in args[5:]]
    module, *where = native.target(logits)
    module.logps_backward(
        *where,
        *_inputs(logits, labels, *settings, row_thresholds),
        *map(native.address, kept),
        native.rows(grad_logits),
    )


def _empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward(logits, labels, *args, **options):
    grad_logits = on_huge_pages(_empty_gradient(logits))
    _backward_into(grad_logits, logits, labels, *args, **options)
    return grad_logits


def _backward_(logits, labels, *args, **options):
    _backward_into(logits, logits, labels, *args, **options)
    torch.autograd.graph.increment_version(logits)


def _with_absent(logits: Tensor, results: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(results[n] if n in results else logits.new_empty(0) for n in ALL)


def _with_grad_(logits, labels, *args):
    *settings, outputs, grad_logps, grad_entropy, grad_lse = args
    results = _empty_outputs(logits, labels, outputs)
    everything = _with_absent(logits, results)
    if labels.numel() == 0:
        return everything
    if logits.is_cuda and native.debug():
        check_values(logits, labels, settings[0], settings[-1])
    needed = (*INTERNAL, *(() if grad_entropy is None else ("entropy",)))
    named = _empty_outputs(logits, labels, list(needed)) | results
    grads = grad_logps, grad_entropy, grad_lse
    kept = [None if t is None else t.float().contiguous() for t in grads]
    module, *where = native.target(logits)
    module.logps_with_grad(
        *where,
        *_inputs(logits, labels, *settings, None),
        *(native.address(named.get(name)) for name in (*INTERNAL, *KERNEL_ORDER)),
        *map(native.address, kept),
    )
    torch.autograd.graph.increment_version(logits)
    return everything


native.implement("logps_forward", _forward)
native.implement("logps_backward", _backward)
native.implement("logps_backward_", _backward_)
native.implement("logps_with_grad_", _with_grad_)


@torch.library.register_fake("rlhf_fast::logps_forward", lib=native.LIBRARY)
def _(logits, labels, *args, **options):
    return list(_empty_outputs(logits, labels, args[-1]).values())


@torch.library.register_fake("rlhf_fast::logps_backward", lib=native.LIBRARY)
def _(logits, labels, *args, **options):
    return _empty_gradient(logits)


@torch.library.register_fake("rlhf_fast::logps_backward_", lib=native.LIBRARY)
def _(logits, labels, *args, **options):
    return None


@torch.library.register_fake("rlhf_fast::logps_with_grad_", lib=native.LIBRARY)
def _(logits, labels, *args):
    return _with_absent(logits, _empty_outputs(logits, labels, args[-4]))
