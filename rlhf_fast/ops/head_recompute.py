"""Any function of log-probs over a trained head: logits kept for backward, or computed again.

The logits of as many rows as the budget holds are kept and overwritten by their gradient in
backward; those of the others are computed a second time, one product of 2NVD more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.memory import on_huge_pages
from rlhf_fast.ops import matmul
from rlhf_fast.ops.head import (
    Grads,
    Head,
    Needs,
    Statistics,
    joined,
    live_rows,
    move_to_front_,
    pick,
    pick_grads,
)
from rlhf_fast.ops.head_columns import slices, statistics_by_columns


def forward_keeping_logits(
    head: Head, outputs: tuple[str, ...], needs_gradient: bool, room: int = 0
) -> tuple[Statistics, Tensor]:
    """Statistics of all rows; logits of the first ones, if a gradient is wanted.

    `room`: rows to have room for, beyond those that are kept.
    """
    num_kept = head.num_kept if needs_gradient else 0
    kept, parts = head.buffer(max(num_kept, room)), []
    for rows in head.chunks(0, num_kept):
        part = head.select(rows)
        parts.append(part.statistics(part.logits(kept[rows]), outputs))
    if num_kept < head.num_rows:
        rest = head.select(slice(num_kept, head.num_rows))
        parts.append(statistics_alone(rest, outputs))
    return joined(head, parts, outputs), kept


def statistics_alone(head: Head, outputs: tuple[str, ...]) -> Statistics:
    """Statistics of all rows, whose logits are not kept."""
    if head.takes_columns():
        return statistics_by_columns(head, outputs)
    parts, scratch = [], head.buffer(min(head.chunk_rows(), head.num_rows))
    for rows in head.chunks():
        part = head.select(rows)
        parts.append(part.statistics(part.logits(scratch[: part.num_rows]), outputs))
    return joined(head, parts, outputs)


def backward_by_columns(
    head: Head,
    statistics: Statistics,
    grads: Grads,
    needs: Needs,
    dtype: torch.dtype,
    kept: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from the kept logits of the first rows, which are overwritten, and recomputed ones.

    Recomputing goes by slices of the vocabulary, all rows at once: so the weight's gradient, of
    `dtype`, is written once and rounded once, and no float32 copy of its size is needed.
    """
    num_kept, live = kept.shape[0], live_rows(grads, head.labels)
    first: slice | Tensor = slice(0, num_kept)
    rest: slice | Tensor = slice(num_kept, head.num_rows)
    if live is not None:
        first, rest = move_to_front_(kept, live[live < num_kept]), live[live >= num_kept]
    known, again = head.select(first), head.select(rest)
    kept = kept[: known.num_rows]
    _differentiate_kept_(known, kept, pick(statistics, first), pick_grads(grads, first))
    statistics, grads = pick(statistics, rest), pick_grads(grads, rest)

    d_hidden = torch.zeros_like(again.hidden, dtype=torch.float32)
    d_weight = None
    if needs.weight:
        d_weight = on_huge_pages(torch.empty_like(head.weight, dtype=dtype))
    d_bias = d_hidden.new_zeros(head.vocab_size) if needs.bias else None
    for piece in slices(again):
        columns, terms = piece.columns, []
        if known.num_rows:
            terms.append((head.as_operand(kept[:, columns]), known.hidden))
        if again.num_rows:
            logits = piece.logits()
            piece.differentiate_(logits, statistics, grads)
            logits = head.as_operand(logits)
            terms.append((logits, again.hidden))
            if needs.hidden:
                matmul.add_product(d_hidden, logits, piece.head.weight)
        if d_weight is not None:
            matmul.sum_products(d_weight[columns], [(z.t(), hidden) for z, hidden in terms])
        if d_bias is not None:
            for z, _ in terms:
                d_bias[columns] += z.sum(0, dtype=torch.float32)
    if not needs.hidden:
        return None, d_weight, d_bias
    everywhere = torch.zeros_like(head.hidden)
    if known.num_rows:
        everywhere[first] = _product_with_weight(known, kept)
    everywhere[rest] = d_hidden.to(everywhere.dtype)
    return everywhere, d_weight, d_bias


def _differentiate_kept_(head: Head, logits: Tensor, statistics: Statistics, grads: Grads) -> None:
    for rows in head.chunks():
        part = head.select(rows)
        part.differentiate_(logits[rows], pick(statistics, rows), pick_grads(grads, rows))


def _product_with_weight(head: Head, dlogits: Tensor) -> Tensor:
    weight, product = head.weight_for_hidden(), torch.empty_like(head.hidden)
    # By chunks only where each has to be converted.
    size = head.num_rows if dlogits.dtype == weight.dtype else 0
    for rows in head.chunks(size=size):
        torch.mm(head.as_operand(dlogits[rows]), weight, out=product[rows])
    return product
