"""Liger's fused linear JSD loss: its class and results, on our divergence kernel.

Student and teacher logits exist for a chunk of rows at a time, and gradients are taken in forward:
five products of 2NVD where the teacher's width is the student's, none of them computed twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_fast.ops import autograd, kl, logps, matmul
from rlhf_fast.ops.head import Head, Needs
from rlhf_fast.ops.head_inputs import HeadSettings, prepare
from rlhf_fast.ops.head_loss import HeadGradients

OP = "FusedLinearJSDLoss"


class FusedLinearJSDLoss(nn.Module):
    """Stands for `LigerFusedLinearJSDLoss`: the weighted sum of cross-entropy and divergence from a
    teacher, or (sum, soft, hard) with `return_soft_hard_loss`; only the sum carries a gradient.

    beta 0 is KL(teacher || student), 1 KL(student || teacher), between them the generalised
    Jensen-Shannon divergence (arXiv 2306.13649). Both losses are means over labels other than
    `ignore_index`; `temperature` divides the logits of the divergence only. As in Liger, a student
    of a smaller vocabulary has logits of 0 for the words it lacks. `compiled` and `chunk_size` have
    no effect.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        _must(0 <= beta <= 1, "beta must be from 0 to 1", beta)
        _must(temperature > 0, "temperature must be positive", temperature)
        self.weights = (weight_soft_loss, weight_hard_loss)
        self.ignore_index, self.return_parts = ignore_index, return_soft_hard_loss
        kind = {0: "forward", 1: "reverse"}.get(beta, "jsd")
        self.divergence = {"kind": kind, "temperature": temperature}
        if kind == "jsd":
            self.divergence["beta"] = beta

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ):
        _must(
            len(teacher_weight) >= len(student_weight),
            f"teacher_weight must have at least the student's {len(student_weight)} words",
            len(teacher_weight),
        )
        _must(
            teacher_input.shape[:-1] == student_input.shape[:-1],
            f"teacher_input must have the rows of student_input, {tuple(student_input.shape[:-1])}",
            tuple(teacher_input.shape[:-1]),
        )
        student = prepare(
            OP,
            student_input,
            student_weight,
            true_labels,
            student_bias,
            None,
            HeadSettings(ignore_index=self.ignore_index),
        )
        with torch.no_grad():
            teacher_rows = student.gather_rows(teacher_input)
            teacher = (teacher_rows, teacher_weight.to(teacher_rows.dtype), teacher_bias)
        grads = (student.hidden, student.weight, student.bias)
        loss, *parts = _Distillation.apply(*grads, student, teacher, self)
        return (loss, *parts) if self.return_parts else loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, student, teacher, settings):
        needs = Needs(*ctx.needs_input_grad[:3])
        args = (student.labels, None, student.scalars)
        head = Head.in_dtype_of_hidden(hidden, weight, bias, *args)
        with matmul.fastest(head.hidden):
            parts, gradients = _one_pass(head, teacher, settings, needs, weight.dtype)
        found = (gradients.hidden, gradients.weight, gradients.bias)
        ctx.save_for_backward(
            *(None if g is None else g.to(t.dtype) for g, t in zip(found, (hidden, weight, bias)))
        )
        loss = sum(weight * part for weight, part in zip(settings.weights, parts))
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad_loss, *_):
        found = (None if g is None else g * grad_loss for g in ctx.saved_tensors)
        return *found, None, None, None


def _one_pass(head: Head, teacher, settings: FusedLinearJSDLoss, needs: Needs, dtype: torch.dtype):
    """((divergence, cross-entropy), means over the live rows; gradients of their weighted sum)."""
    teacher_hidden, teacher_weight, teacher_bias = teacher
    chunks = head.chunks()
    gradients = HeadGradients(head, needs, dtype, len(chunks))
    totals = head.hidden.new_zeros(2, dtype=torch.float32)
    count = max(head.num_rows, 1)
    missing = len(teacher_weight) - head.vocab_size
    for rows in chunks:
        part = head.select(rows)
        logits = part.logits(head.buffer(len(part.labels))).requires_grad_(any(needs))
        target = F.linear(teacher_hidden[rows], teacher_weight, teacher_bias)
        with torch.enable_grad():
            padded = F.pad(logits, (0, missing)) if missing else logits
            soft = kl(padded, target, **settings.divergence).sum() / count
            hard = -logps(logits, part.labels).logps.sum() / count
            loss = sum(w * x for w, x in zip(settings.weights, (soft, hard)))
        totals += torch.stack((soft, hard)).detach()
        if any(needs):
            (dlogits,) = torch.autograd.grad(loss, logits)
            gradients.add(dlogits, rows)
    return totals.unbind(), gradients


def _must(condition: bool, must: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{OP}: {must}, got {got}; see its documentation")
