"""How the losses of tokens become one number: the same five ways for every token loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
GIVEN, TOKENS, SEQUENCES = 0, 1, 2  # csrc/include/rlhf_fast/common.h, Denominator
_DENOMINATORS = {"token-mean": TOKENS, "token-sum": GIVEN}

SCHEMA = (
    "Tensor? normalizer, Tensor? sequence_weights, int denominator, bool mean_over_tokens, "
    "float scale"
)


class Aggregation(NamedTuple):
    """In the order of SCHEMA."""

    normalizer: Tensor | None
    """0-dim float32; what divides the sum where the denominator is given."""
    sequence_weights: Tensor | None
    denominator: int
    mean_over_tokens: bool
    scale: float


def plan(
    op: str,
    aggregation: str,
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    *,
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> Aggregation:
    """What the kernels are told for one of AGGREGATIONS, which the caller has checked."""
    mean_over_tokens = aggregation == "seq-mean-token-mean"
    if normalizer is not None:
        return Aggregation(_normalizer(op, normalizer, tokens), None, GIVEN, mean_over_tokens, 1.0)
    scale = 1.0
    if aggregation == "seq-mean-token-sum-norm":
        if max_length is None and cu_seqlens is not None:
            must = "max_length must be given for packed sequences and seq-mean-token-sum-norm"
            native.refuse(op, must, None, "there is no batch width to take instead")
        scale = 1 / (max_length or max(tokens.shape[-1], 1))
    return Aggregation(
        None, None, _DENOMINATORS.get(aggregation, SEQUENCES), mean_over_tokens, scale
    )


def in_segments(
    how: Aggregation,
    mask: Tensor | None,
    tokens: Tensor,
    sequence_offsets: Tensor,
    segment_offsets: Tensor,
) -> Aggregation:
    """The same result where the kernels see segments of the sequences as sequences."""
    counts = tokens.new_ones(tokens.numel()) if mask is None else mask.reshape(-1).float()
    before = torch.nn.functional.pad(counts.double().cumsum(0), (1, 0))
    lengths = before[sequence_offsets].diff().float()
    weights, normalizer = None, how.normalizer
    if how.mean_over_tokens:
        sequence = torch.searchsorted(sequence_offsets[1:], segment_offsets[:-1], right=True)
        weights = 1 / lengths.clamp(min=1)[sequence.clamp(max=max(len(lengths) - 1, 0))]
    if how.denominator == TOKENS:
        normalizer = lengths.sum().clamp(min=1)
    elif how.denominator == SEQUENCES:
        normalizer = (lengths > 0).sum().float().clamp(min=1)
    return Aggregation(normalizer, weights, GIVEN, False, how.scale)


def pack(how: Aggregation) -> tuple[int, bool, float, int, int]:
    """As the bindings take it."""
    addresses = native.address(how.normalizer), native.address(how.sequence_weights)
    return how.denominator, how.mean_over_tokens, how.scale, *addresses


def aggregate_ref(
    token_loss: Tensor,
    counts: Tensor,
    aggregation: str,
    max_length: int,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The aggregations in plain PyTorch, of (B, T) losses and the mask of those that count."""
    token_loss = token_loss.masked_fill(~counts, 0.0)
    lengths = counts.sum(1)
    per_sequence = token_loss.sum(1)
    if aggregation == "seq-mean-token-mean":
        per_sequence = per_sequence / lengths.clamp(min=1)
    denominator = (lengths > 0).sum().clamp(min=1)
    if aggregation == "seq-mean-token-sum-norm":
        denominator = denominator * max_length
    elif aggregation == "token-mean":
        denominator = lengths.sum().clamp(min=1)
    elif aggregation == "token-sum":
        denominator = 1
    return per_sequence.sum() / (denominator if normalizer is None else normalizer)


def _normalizer(op: str, normalizer: float | Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(normalizer, Tensor):
        native.check(normalizer > 0, op, "normalizer must be positive", normalizer, "pass a count")
        return torch.full((), float(normalizer), dtype=torch.float32, device=tokens.device)
    sequences.check_like(op, "normalizer", normalizer, tokens, ())
    return sequences.plain(normalizer)
