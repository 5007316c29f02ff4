"""Divergences between the distributions of two sets of logits, over the whole vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, native
from rlhf_fast.ops.kl_kernels import OPS
from rlhf_fast.ops.logps import logps
from rlhf_fast.ops.logps_inputs import overlaps_itself

KINDS = ("forward", "reverse", "jsd")


@native.takes_tensors
def kl(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence between softmax(logits) and softmax(teacher_logits), for each row, in nats.

    With p the student's and q the teacher's probabilities:

    - `forward`: KL(q || p) = sum q log(q / p)
    - `reverse`: KL(p || q) = sum p log(p / q)
    - `jsd`: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, the generalised
      Jensen-Shannon divergence of arXiv 2306.13649 for 0 < beta < 1

    Nothing of the logits' size is allocated in forward; backward allocates the gradients of the
    sides that require them and nothing else. Accumulates in float32.

    Args:
        logits: (..., V) of the student, float32, float16 or bfloat16; rows may be strided.
        teacher_logits: the same shape and dtype.
        temperature: divides both; the result is not multiplied by its square.

    Returns:
        (...) float32, differentiable with respect to both.

    Raises:
        ValueError: for shapes, dtypes or settings that do not fit.
    """
    _check(logits, teacher_logits, kind, beta, temperature)
    a, b = (logits, teacher_logits) if kind == "reverse" else (teacher_logits, logits)
    settings = (float(temperature), kind == "jsd", float(beta))
    if autograd.wants_gradient(a, b):
        return _Kl.apply(a, b, *settings)
    return OPS.kl_forward(a, b, *settings)[0]


@native.takes_tensors
def kl_with_grad_(
    logits: Tensor,
    teacher_logits: Tensor,
    grad: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Divergences, and the gradient of `(grad * kl).sum()` written over the student's logits.

    Equivalent to `kl` followed by its backward, for losses whose weight of each row is known before
    its divergence: a mean over tokens, say. Both logits are read once and one is written once;
    nothing of their size is allocated. Not differentiable itself.

    Args:
        grad: (...) float32.

    The other arguments are those of `kl`, which also raises the same errors.
    """
    op = "kl_with_grad_"
    _check(logits, teacher_logits, kind, beta, temperature)
    native.check(
        grad.shape == logits.shape[:-1] and grad.device == logits.device,
        op,
        f"grad must have shape {tuple(logits.shape[:-1])} on {logits.device}",
        f"{tuple(grad.shape)} on {grad.device}",
        "reshape or move it",
    )
    native.check(
        not overlaps_itself(logits) and not autograd.wants_gradient(logits),
        op,
        "logits must be constants that do not overlap themselves",
        f"requires_grad={logits.requires_grad}, strides {logits.stride()}",
        "detach them, or use kl",
    )
    settings = (kind == "reverse", float(temperature), kind == "jsd", float(beta))
    return OPS.kl_with_grad_(logits, teacher_logits, grad, *settings)


def kl_ref(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """What `kl` computes, in plain PyTorch: float64 logits are computed in float64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)

    def divergence(log_a, log_b):
        return torch.where(log_a == -torch.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)

    if kind == "forward":
        return divergence(log_q, log_p)
    if kind == "reverse":
        return divergence(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * divergence(log_q, log_m) + (1 - beta) * divergence(log_p, log_m)


@native.takes_tensors
def kl_top_k(
    logits: Tensor,
    teacher_indices: Tensor,
    teacher_logps: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Forward KL against a teacher of whom only some entries per row are known.

    Equivalent to `(q * (teacher_logps - log_p.gather(-1, teacher_indices))).sum(-1)` with
    q = teacher_logps.exp() and log_p the student's log-softmax over the whole vocabulary. If the
    teacher's log-probs are those of its full distribution, this is the part of the divergence that
    its top entries make up.

    Args:
        logits: (..., V) of the student.
        teacher_indices: (..., K) int32 or int64, -100 where a row has fewer entries.
        teacher_logps: (..., K) log-probabilities of these entries under the teacher.
        temperature: divides the student's logits.
    """
    native.check(
        teacher_logps.shape == teacher_indices.shape,
        "kl_top_k",
        f"teacher_logps must have the shape of teacher_indices, {tuple(teacher_indices.shape)}",
        tuple(teacher_logps.shape),
        "pass what one topk() call returned",
    )
    student = logps(logits, teacher_indices, temperature=temperature).logps
    known = teacher_logps.float().masked_fill(teacher_indices == -100, -torch.inf)
    return torch.where(known > -torch.inf, known.exp() * (known - student), 0.0).sum(-1)


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, temperature, jsd, beta):
        divergence, stats = OPS.kl_forward(a, b, temperature, jsd, beta)
        ctx.save_for_backward(a, b, stats)
        ctx.settings = (temperature, jsd, beta)
        return divergence

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        a, b, stats = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        found = iter(OPS.kl_backward(a, b, *ctx.settings, stats, grad, *need))
        return *(next(found) if needed else None for needed in need), None, None, None


def _check(logits, teacher_logits, kind, beta, temperature) -> None:
    op = "kl"
    native.check_rows(op, "logits", logits)
    native.check_rows(op, "teacher_logits", teacher_logits)
    same = all(
        getattr(logits, name) == getattr(teacher_logits, name)
        for name in ("shape", "dtype", "device")
    )
    native.check(
        same,
        op,
        f"teacher_logits must match the logits, {logits.dtype} {tuple(logits.shape)} on "
        f"{logits.device}",
        f"{teacher_logits.dtype} {tuple(teacher_logits.shape)} on {teacher_logits.device}",
        "convert or cut them; both models must share one vocabulary",
    )
    native.check(kind in KINDS, op, f"kind must be one of {KINDS}", repr(kind), "see its docstring")
    native.check(
        kind != "jsd" or 0.0 < beta < 1.0,
        op,
        "beta must lie between 0 and 1",
        beta,
        "at the ends use kind='forward' or 'reverse'",
    )
    native.check(
        0 < temperature < math.inf,
        op,
        "temperature must be positive and finite",
        temperature,
        "leave it out for 1",
    )
