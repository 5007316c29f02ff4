"""The ops behind `kl` that torch's dispatcher knows, and their calls of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.memory import on_huge_pages
from rlhf_fast.ops import native

_SETTINGS = "float temperature, bool jsd, float beta"
NUM_STATS = 6
native.LIBRARY.define(f"kl_forward(Tensor a, Tensor b, {_SETTINGS}) -> (Tensor, Tensor)")
native.LIBRARY.define(
    f"kl_backward(Tensor a, Tensor b, {_SETTINGS}, Tensor stats, Tensor grad_divergence, "
    "bool need_a, bool need_b) -> Tensor[]"
)
native.LIBRARY.define(
    "kl_with_grad_(Tensor(a!) logits, Tensor teacher_logits, Tensor grad, bool reverse, "
    f"{_SETTINGS}) -> Tensor"
)


def _empty_outputs(a: Tensor) -> tuple[Tensor, Tensor]:
    shape = a.shape[:-1]
    divergence = a.new_empty(shape, dtype=torch.float32)
    return divergence, a.new_empty((NUM_STATS, *shape), dtype=torch.float32)


def _empty_grads(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> list[Tensor]:
    sides = ((a, need_a), (b, need_b))
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, need in sides if need]


def _native_inputs(a, b, temperature, jsd, beta):
    """The module for these tensors, and what each of its functions takes first."""
    module, *where = native.target(a)
    return module, (*where, native.rows(a), native.rows(b), temperature, jsd, beta)


def _forward(a, b, temperature, jsd, beta):
    divergence, stats = _empty_outputs(a)
    if a.numel():
        module, inputs = _native_inputs(a, b, temperature, jsd, beta)
        module.kl_forward(*inputs, divergence.data_ptr(), stats.data_ptr())
    return divergence, stats


def _backward(a, b, temperature, jsd, beta, stats, grad_divergence, need_a, need_b):
    grads = [on_huge_pages(grad) for grad in _empty_grads(a, b, need_a, need_b)]
    if a.numel() and grads:
        found = iter(grads)
        upstream = grad_divergence.float().contiguous()
        module, inputs = _native_inputs(a, b, temperature, jsd, beta)
        module.kl_backward(
            *inputs,
            stats.data_ptr(),
            upstream.data_ptr(),
            native.rows(next(found)) if need_a else None,
            native.rows(next(found)) if need_b else None,
        )
    return grads


def _with_grad_(logits, teacher_logits, grad, reverse, temperature, jsd, beta):
    divergence, stats = _empty_outputs(logits)
    native.check(
        logits.untyped_storage().data_ptr() != teacher_logits.untyped_storage().data_ptr()
        or logits.numel() == 0,
        "kl_with_grad_",
        "teacher_logits must lie in other memory than the logits, which are overwritten",
        "the same storage",
        "clone one of them",
    )
    if logits.numel():
        a, b = (logits, teacher_logits) if reverse else (teacher_logits, logits)
        upstream = grad.float().contiguous()
        module, inputs = _native_inputs(a, b, temperature, jsd, beta)
        module.kl_with_grad(
            *inputs,
            divergence.data_ptr(),
            stats.data_ptr(),
            upstream.data_ptr(),
            reverse,
        )
    torch.autograd.graph.increment_version(logits)
    return divergence


native.implement("kl_forward", _forward)
native.implement("kl_backward", _backward)
native.implement("kl_with_grad_", _with_grad_)


@torch.library.register_fake("rlhf_fast::kl_forward", lib=native.LIBRARY)
def _(a, b, temperature, jsd, beta):
    return _empty_outputs(a)


@torch.library.register_fake("rlhf_fast::kl_backward", lib=native.LIBRARY)
def _(a, b, temperature, jsd, beta, stats, grad_divergence, need_a, need_b):
    return _empty_grads(a, b, need_a, need_b)


@torch.library.register_fake("rlhf_fast::kl_with_grad_", lib=native.LIBRARY)
def _(logits, teacher_logits, grad, reverse, temperature, jsd, beta):
    return _empty_outputs(logits)[0]


OPS = torch.ops.rlhf_fast
