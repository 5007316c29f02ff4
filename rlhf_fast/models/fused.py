"""Parts of a decoder layer that keep less for backward than PyTorch's graph of them would.

Each computes what the Hugging Face modules compute, operation by operation, under autocast in the
same dtypes too; values that follow cheaply from others are computed again in backward. A weight's
gradient is returned as its product makes it: autograd gives it the dtype that the weight asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.ops import autograd


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension; keeps x alone.

    Equivalent to Llama's RMSNorm, or with offset 1 to Gemma's, for float32 x.
    """
    return _RMSNorm.apply(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (x * scale).mul_(weight + offset if offset else weight)

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        factor = weight.float() + ctx.offset
        normed = x * scale
        product = grad * normed
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = product.reshape(-1, width).sum(0).to(weight.dtype)
        along = (product @ factor)[..., None]
        d_x = (grad * factor).addcmul_(normed, along, value=-1 / width).mul_(scale)
        return d_x, d_weight, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin: rotary position embedding (arXiv 2104.09864, equation 34).

    cos and sin broadcast with x and pass no gradient.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        first, second = x.chunk(2, -1)
        out = x * cos
        out_first, out_second = out.chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        out_first.sub_(second * sin_first)
        out_second.add_(first * sin_second)
        return out

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        first, second = grad.chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        d_x = grad * cos
        d_first, d_second = d_x.chunk(2, -1)
        d_first.add_(second * sin_second)
        d_second.sub_(first * sin_first)
        return d_x.to(ctx.dtype), None, None


def joint_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Linear layers of the same input as one product, which keeps one copy of that input.

    Equivalent to `[F.linear(x, w, b) for w, b in zip(weights, biases)]`; all have a bias or none.
    """
    count = len(weights)
    given = [b for b in biases if b is not None]
    joint = _JointLinear.apply(x, count, *weights, *given)
    return list(joint.split([len(weight) for weight in weights], -1))


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, *parameters):
        weights, biases = parameters[:count], parameters[count:]
        rows = _rows(x)
        ctx.count, ctx.dtype = count, x.dtype
        ctx.save_for_backward(rows, *parameters)
        weight = _stack(weights, rows.dtype).t()
        out = torch.addmm(_stack(biases, rows.dtype), rows, weight) if biases else rows @ weight
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        rows, *parameters = ctx.saved_tensors
        weights = parameters[: ctx.count]
        needs = ctx.needs_input_grad[2:]
        shape, grad = grad.shape[:-1], grad.reshape(len(rows), -1)
        found: list[Tensor | None] = [None] * len(parameters)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ _stack(weights, grad.dtype)).to(ctx.dtype).view(*shape, -1)
        sizes = [len(weight) for weight in weights]
        if any(needs[: ctx.count]):
            found[: ctx.count] = (grad.t() @ rows).split(sizes)
        if any(needs[ctx.count :]):
            found[ctx.count :] = grad.sum(0, dtype=torch.float32).split(sizes)
        return d_x, None, *(g if n else None for g, n in zip(found, needs))


def gated_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """(activation(x @ gate.T) * (x @ up.T)) @ down.T; keeps x and its two products.

    x: (..., D); gate, up: (I, D); down: (D, I).
    """
    return _GatedMLP.apply(x, gate, up, down, activation)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, activation):
        rows = _rows(x)
        joint = rows @ _stack((gate, up), rows.dtype).t()
        ctx.save_for_backward(rows, joint, gate, up, down)
        ctx.activation, ctx.dtype = activation, x.dtype
        first, second = joint.chunk(2, -1)
        inner = activation(first).mul_(second)
        return (inner @ down.to(rows.dtype).t()).view(*x.shape[:-1], -1)

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        rows, joint, gate, up, down = ctx.saved_tensors
        needs = ctx.needs_input_grad
        shape, grad = grad.shape, grad.reshape(len(rows), -1)
        first, second = joint.chunk(2, -1)
        with torch.enable_grad():
            leaf = first.detach().requires_grad_()
            active = ctx.activation(leaf)
        value = active.detach()
        d_down = None
        if needs[3]:
            d_down = grad.t() @ (value * second)
        d_inner = grad @ down.to(grad.dtype)
        d_joint = torch.empty_like(joint)
        d_first, d_second = d_joint.chunk(2, -1)
        torch.mul(d_inner, value, out=d_second)
        (through,) = torch.autograd.grad(active, leaf, d_inner.mul_(second))
        d_first.copy_(through)
        d_x = d_gate = d_up = None
        if needs[0]:
            d_x = (d_joint @ _stack((gate, up), grad.dtype)).to(ctx.dtype).view(shape)
        if needs[1] or needs[2]:
            d_gate, d_up = (d_joint.t() @ rows).split([len(gate), len(up)])
        return d_x, d_gate if needs[1] else None, d_up if needs[2] else None, d_down, None


def _rows(x: Tensor) -> Tensor:
    """[N, D] in the dtype of the products: autocast's, where it is on."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        rows = rows.to(torch.get_autocast_dtype(x.device.type))
    return rows


def _stack(parameters, dtype: torch.dtype) -> Tensor:
    """One above the other, in this dtype, written once."""
    first = parameters[0]
    stacked = first.new_empty(sum(map(len, parameters)), *first.shape[1:], dtype=dtype)
    for piece, parameter in zip(stacked.split([len(p) for p in parameters]), parameters):
        piece.copy_(parameter)
    return stacked
