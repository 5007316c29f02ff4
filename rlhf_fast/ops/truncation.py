"""Where top-k and top-p cut a row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import native

CHUNK_ELEMENTS = 1 << 24  # sorted at a time: bounds the memory of a sort to 256 MB


@torch.no_grad()
def thresholds(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """The least logit of each row, (...) float32, that top-k and then top-p keep."""
    native.check(
        top_k is None or top_k >= 1, "logps", "top_k must be at least 1", top_k, "leave it out"
    )
    native.check(
        top_p is None or 0.0 < top_p <= 1.0,
        "logps",
        "top_p must lie in (0, 1]",
        top_p,
        "leave it out to keep everything",
    )
    rows = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
    per_row = isinstance(temperature, Tensor)
    if per_row:
        temperature = temperature.expand(logits.shape[:-1]).reshape(-1, 1).float()
    step = max(1, CHUNK_ELEMENTS // rows.shape[-1])
    found = [
        _chunk_thresholds(
            rows[i : i + step],
            temperature[i : i + step] if per_row else temperature,
            softcap,
            logit_scale,
            top_k,
            top_p,
        )
        for i in range(0, rows.shape[0], step)
    ]
    whole = torch.cat(found) if found else logits.new_empty(0, dtype=torch.float32)
    return whole.view(logits.shape[:-1])


def _chunk_thresholds(rows, temperature, softcap, logit_scale, top_k, top_p) -> Tensor:
    count = rows.shape[-1] if top_k is None else min(top_k, rows.shape[-1])
    if top_p is None:
        return rows.topk(count, dim=-1).values[:, -1].float()
    # Where several logits equal the k-th, top-k keeps them all, so all are among the ordered ones.
    ordered = rows.float().sort(dim=-1, descending=True).values
    z = ordered * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = (z / temperature).masked_fill(ordered < ordered[:, count - 1 : count], -torch.inf)
    probs = z.softmax(-1)
    before = probs.cumsum(-1) - probs  # what the larger ones have together
    return ordered.masked_fill(before >= top_p, torch.inf).amin(-1)
