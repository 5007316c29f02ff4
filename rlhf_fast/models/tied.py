"""One gradient for a weight that is both embedding and head.

Autograd holds the head's gradient until the embedding has made one of its own size, and adds them
up; here both add to the weight's `.grad` where it lies, so the second one is never made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_fast.ops import autograd

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TiedWeight:
    """`with tied():` around a forward and its `backward()` on a CPU; elsewhere nothing changes.

    The gradient is then in `.grad` alone: `torch.autograd.grad` finds none for this weight.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.is_active = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._applies():
            yield
            return
        self.is_active = True
        self.embedding.forward = lambda ids: _Embedding.apply(
            ids, self.embedding.weight, self.embedding.padding_idx
        )
        try:
            yield
        finally:
            self.is_active = False
            del self.embedding.forward

    def of_head(self, weight: Tensor) -> Tensor:
        """The weight as the head is to use it."""
        return _Head.apply(weight) if self.is_active and torch.is_grad_enabled() else weight

    def _applies(self) -> bool:
        embedding, weight = self.embedding, getattr(self.embedding, "weight", None)
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        return (
            type(embedding) is nn.Embedding
            and getattr(self.head, "weight", None) is weight
            and type(weight) is nn.Parameter  # no share of one
            and weight.device.type == "cpu"
            and weight.requires_grad
            and not any(getattr(weight, name, None) for name in hooks)
            and not (embedding.max_norm or embedding.scale_grad_by_freq or embedding.sparse)
            and "forward" not in vars(embedding)
        )


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        if ctx.weight.grad is None:
            ctx.weight.grad = grad
        else:
            ctx.weight.grad.add_(grad)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding_idx):
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad):
        ids, rows = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:  # its embedding is not trained, by torch's definition
            rows = rows.masked_fill((ids == ctx.padding_idx)[:, None], 0.0)
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        ctx.weight.grad.index_add_(0, ids, rows.to(ctx.weight.dtype))
        return None, None, None
