"""Output embeddings that return `DeferredLogits` for as long as a framework's method runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor

from rlhf_fast.integrations.deferred import DeferredLogits


@contextlib.contextmanager
def deferred_heads(*models: nn.Module | None) -> Iterator[None]:
    """Within the block these models return `DeferredLogits`, if their heads allow it."""
    heads = {id(head): head for head in map(plain_head, models) if head is not None}
    for head in heads.values():
        head.forward = lambda hidden, head=head: DeferredLogits(hidden, head.weight, head.bias)
    try:
        yield
    finally:
        for head in heads.values():
            del head.forward


def plain_head(model: nn.Module | None) -> nn.Linear | None:
    """The output embedding, where its weight can also be read outside the model's forward.

    None for adapters and quantised heads, for weights that are sharded (FSDP, ZeRO-3) or offloaded,
    and for wrappers that look into the output: these keep computing logits.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        if isinstance(model, nn.DataParallel) or getattr(model, "find_unused_parameters", False):
            return None
        model = model.module
    if hasattr(model, "_orig_mod") or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features) and not hasattr(weight, "ds_id")
    return head if whole and not isinstance(weight, DTensor) and not weight.is_meta else None
