"""Attention under a mask on the CPU, as batched matrix products.

torch's fused CPU attention takes its products one small block at a time; whole products are faster,
in bfloat16 several times. Scores are computed again in backward where keeping them would cost
memory, so the peak is that of the fused one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_fast.ops import matmul

PRODUCTS = "rlhf_fast_products"
"""The name under which transformers knows this attention."""
KEEP_BYTES = 4 << 20
"""Probabilities of one layer that are kept for backward."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """softmax(scaling * query @ key.T + mask) @ value, as transformers' attention functions do.

    query: [B, H, L, D]; key, value: [B, G, L, D] with H a multiple of G; the mask is additive,
    [B, 1, L, L] and of the query's dtype. Without such a mask torch's own attention runs.
    """
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings come in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    additive = attention_mask is not None and attention_mask.dtype == query.dtype
    if not additive or softcap is not None or s_aux is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _Attention.apply(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scaling):
        query, key, value = _grouped(query, key.shape[1]), _flat(key), _flat(value)
        probabilities = _probabilities(query, key, mask, scaling)
        output = torch.bmm(probabilities, value)
        ctx.scaling = scaling
        kept = probabilities if probabilities.nbytes <= KEEP_BYTES else None
        ctx.save_for_backward(query, key, value, mask, kept)
        batch, length = mask.shape[0], mask.shape[-1]
        return output.view(batch, -1, length, output.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output):
        query, key, value, mask, probabilities = ctx.saved_tensors
        if probabilities is None:
            probabilities = _probabilities(query, key, mask, ctx.scaling)
        batch, _, length, width = d_output.shape
        d_output = d_output.reshape(query.shape)
        d_value = torch.bmm(probabilities.transpose(1, 2), d_output)
        d_scores = torch.bmm(d_output, value.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_scores, probabilities, -1, query.dtype)
        d_query = torch.bmm(d_scores, key).mul_(ctx.scaling)
        d_key = torch.bmm(d_scores.transpose(1, 2), query).mul_(ctx.scaling)
        shape = (batch, -1, length, width)
        return d_query.view(shape), d_key.view(shape), d_value.view(shape), None, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[B*G, H/G*L, L] in the query's dtype.

    Scores are float32: rounded to bfloat16, large ones would shift probabilities by percents.
    """
    batch, length = mask.shape[0], mask.shape[-1]
    with matmul.fastest(key.new_empty(0, dtype=torch.float32)):
        scores = torch.bmm(query.float() * scaling, key.float().transpose(1, 2))
    scores.view(batch, -1, length, length).add_(mask)
    return torch.softmax(scores, -1).to(query.dtype)


def _flat(tensor: Tensor) -> Tensor:
    """[B, G, L, D] -> [B*G, L, D]"""
    return tensor.reshape(-1, *tensor.shape[2:])


def _grouped(query: Tensor, num_groups: int) -> Tensor:
    """[B, H, L, D] -> [B*G, H/G*L, D]: the heads that share a key are one product."""
    batch, _, _, width = query.shape
    return query.reshape(batch * num_groups, -1, width)


AttentionInterface.register(PRODUCTS, attention)
AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
