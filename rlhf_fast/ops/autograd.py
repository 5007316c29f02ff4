"""How ops are differentiated: in reverse mode, once; what else is asked for is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlhf_fast.ops import native


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether one of an op's differentiable inputs needs a gradient; refuses forward mode."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    """A kernel reads values alone: its result would have no tangent, which counts as zero."""
    for tensor in tensors:
        if tensor is not None and _may_have_tangent(tensor):
            raise NotImplementedError(
                "rlhf_fast: ops must be differentiated in reverse mode, got a tangent of forward "
                "mode (torch.func.jvp, torch.autograd.forward_ad); use the op's _ref, which is "
                "plain PyTorch"
            )


def refuse_second_order() -> NoReturn:
    raise RuntimeError(
        "rlhf_fast: gradients of fused operations must not be differentiated again, got a backward "
        "with create_graph=True; use plain PyTorch there, such as the op's _ref"
    )


def first_order(backward: Callable) -> Callable:
    """Marks a backward whose gradients cannot be differentiated, and refuses to prepare for it.

    torch's once_differentiable marks its result where the upstream gradient is not a constant, and
    with a leaf of its own. A gradient's dependence on what forward saved would be lost in silence,
    as would either where `torch.autograd.grad` asks for other leaves.
    """

    @functools.wraps(backward)
    def call(ctx, *upstream):
        if torch.is_grad_enabled():
            refuse_second_order()
        return backward(ctx, *upstream)

    return call


def _may_have_tangent(tensor: Tensor) -> bool:
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if len(transforms) > 1:  # unpack_dual would see the innermost one alone
        return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, taken, *inputs):
        loss, *scale_and_gradients = taken
        ctx.save_for_backward(*scale_and_gradients)
        return loss

    @staticmethod
    @first_order
    def backward(ctx, upstream):
        scale, *gradients = ctx.saved_tensors
        if scale is not None:
            upstream = upstream * scale
        # On the CPU a look at the factor is cheaper than a pass over the batch.
        needs_a_pass = upstream.dim() or upstream.is_cuda or not native.is_plain(upstream)
        if needs_a_pass or upstream.item() != 1.0:
            gradients = [None if g is None else g * upstream for g in gradients]
        return None, *gradients


# What Function.apply does where no functorch transform is active.
_apply_plainly = super(torch.autograd.Function, _OnePass).apply


def one_pass(
    loss: Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scale: Tensor | None = None,
) -> Tensor:
    """The loss as a function of inputs whose gradients are already taken; backward multiplies.

    `loss` itself becomes the result: it must be a tensor of its own, not a view. `scale`, 0-dim,
    is a factor that the gradients lack.
    """
    apply = _apply_plainly if native.is_plain(loss) else _OnePass.apply
    return apply((loss, scale, *gradients), *inputs)
