"""Attention inside prompt-sharing trees on the CPU, as batched matrix products.

torch's fused CPU attention takes its products one small block at a time and computes what the mask
forbids; here every prompt and every response is a product of its own, with the keys that it sees
and no others, unless whole rows are so short that calls would take longer than products. Scores are
computed again in backward, so none are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.models.batches import GroupBatch, Span
from rlhf_fast.ops import autograd, matmul

PRODUCTS = "rlhf_fast_products"
"""The name under which transformers knows this attention."""

CELLS_PER_PART = 1000
"""Scores of all heads that take about as long as the calls for one more part."""


class Rows(NamedTuple):
    """Of a part's tokens, per head, in [B * L * heads, D]."""

    queries: Tensor
    keys: Tensor
    count: int
    """Products: spans times groups of heads."""

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        indices = ((query, self.queries), (key, self.keys), (value, self.keys))
        width = query.shape[-1]
        return tuple(_take(t, index).view(self.count, -1, width) for t, index in indices)


@dataclass(frozen=True, eq=False)
class Part:
    """n spans of the same lengths, Q tokens after a prompt of P; each sees K = P + Q tokens.

    Or n whole rows of trees, of Q = K tokens.
    """

    query: Tensor
    """[n, Q] rows of the flattened batch."""
    key: Tensor
    """[n, K], no row twice."""
    mask: Tensor
    """[Q, K] or [n, 1, Q, K] float32, added to the scores."""
    found: dict[tuple[int, int], Rows] = field(default_factory=dict)
    """What `rows` gave; every layer of a model asks for the same."""

    def rows(self, num_heads: int, num_groups: int) -> Rows:
        """Where the heads of the tokens are in [B * L * heads, D].

        The heads that share a key are one product: [n * G, H / G * Q, D].
        """
        if (sizes := (num_heads, num_groups)) not in self.found:
            heads = torch.arange(num_heads).view(1, num_groups, -1, 1)
            queries = self.query[:, None, None] * num_heads + heads
            keys = self.key[:, None] * num_groups + torch.arange(num_groups)[:, None]
            count = len(self.query) * num_groups
            self.found[sizes] = Rows(queries.flatten(), keys.flatten(), count)
        return self.found[sizes]


def plan(batch: GroupBatch) -> list[Part]:
    """The products that a batch needs: its spans, or where these are small and many its rows."""
    rows, length = batch.input_ids.shape
    alike = _alike(batch.spans)
    if rows * length**2 <= CELLS_PER_PART * len(alike):
        tokens = torch.arange(rows * length).view(rows, length)
        return [Part(tokens, tokens, _added(~batch.attention_mask))]
    return [_part(*kind, members) for kind, members in alike.items()]


def _alike(spans: Sequence[Span]) -> dict[tuple[int, int, int], list[Span]]:
    """Spans that can be one product, by the lengths of their prompt, their own, and number.

    Responses of one tree never are: their gradients add up in the rows of their prompt.
    """
    alike: dict[tuple[int, int, int], list[Span]] = {}
    for span in spans:
        alike.setdefault((span.prompt_length, span.length, span.number), []).append(span)
    return alike


def _part(before: int, length: int, _: int, members: Sequence[Span]) -> Part:
    own = torch.tensor([s.start for s in members])[:, None] + torch.arange(length)
    prompt = torch.tensor([s.prompt_start for s in members])[:, None] + torch.arange(before)
    hidden = torch.ones(length, before + length, dtype=torch.bool).triu(before + 1)
    return Part(own, torch.cat([prompt, own], 1), _added(hidden))


def _added(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=torch.float32).masked_fill_(hidden, -torch.inf)


def make_known() -> None:
    """Makes `PRODUCTS` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PRODUCTS, attention)
    AttentionMaskInterface.register(PRODUCTS, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree_parts: list[Part] | None = None,
    **options,
) -> tuple[Tensor, None]:
    """softmax(scaling * query @ key.T) @ value within the parts, as transformers' functions do.

    query: [B, H, L, D]; key, value: [B, G, L, D] with H a multiple of G. Rows that are in no part
    give 0. Without parts torch's own attention runs.
    """
    if tree_parts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise NotImplementedError(f"{type(module).__name__} does not pass tree_parts on")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("softcap and attention sinks")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings come in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A copy, as the value may be a view of the joint projection, which backward would keep whole.
    tokens_first = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    return _Attention.apply(*tokens_first, tree_parts, scaling), None


class _Attention(torch.autograd.Function):
    """query: [B, L, H, D]; key, value: [B, L, G, D]; output as query."""

    @staticmethod
    def forward(ctx, query, key, value, parts, scaling):
        ctx.parts, ctx.scaling = parts, scaling
        ctx.save_for_backward(query, key, value)
        output = torch.zeros(query.shape, dtype=query.dtype)
        with matmul.fastest(query.new_empty(0, dtype=torch.float32)):
            for part in parts:
                rows = part.rows(query.shape[2], key.shape[2])
                q, k, v = rows.gather(query, key, value)
                result = torch.bmm(_probabilities(q, k, part.mask, scaling), v)
                _flat(output).index_copy_(0, rows.queries, result.flatten(0, 1))
        return output

    @staticmethod
    @autograd.first_order
    def backward(ctx, d_output):
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = (torch.zeros(t.shape, dtype=t.dtype) for t in (query, key, value))
        with matmul.fastest(query.new_empty(0, dtype=torch.float32)):
            for part in ctx.parts:
                rows = part.rows(query.shape[2], key.shape[2])
                q, k, v = rows.gather(query, key, value)
                probabilities = _probabilities(q, k, part.mask, ctx.scaling)
                d_out = _take(d_output, rows.queries).view(q.shape)
                _add(d_value, rows.keys, torch.bmm(probabilities.transpose(1, 2), d_out))
                d_scores = torch.bmm(d_out, v.transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_scores, probabilities, -1, q.dtype)
                d_q = torch.bmm(d_scores, k).mul_(ctx.scaling)
                _flat(d_query).index_copy_(0, rows.queries, d_q.flatten(0, 1))
                d_k = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scaling)
                _add(d_key, rows.keys, d_k)
        return d_query, d_key, d_value, None, None


def _flat(tensor: Tensor) -> Tensor:
    """[B, L, heads, D] -> [B * L * heads, D]"""
    return tensor.reshape(-1, tensor.shape[-1])


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    return _flat(tensor).index_select(0, index)


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds to rows of which none comes twice."""
    rows = _flat(total)
    rows.index_copy_(0, index, rows.index_select(0, index).add_(values.flatten(0, 1)))


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[n * G, H / G * Q, K] in the query's dtype.

    Scores are float32: rounded to bfloat16, large ones would shift probabilities by percents.
    """
    scores = torch.bmm(query.float() * scaling, key.float().transpose(1, 2))
    queries, keys = mask.shape[-2:]
    num_rows = len(mask) if mask.dim() == 4 else 1
    scores.view(num_rows, -1, queries, keys).add_(mask)
    return torch.softmax(scores, -1).to(query.dtype)
