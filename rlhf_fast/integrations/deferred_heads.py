"""Output embeddings that return `DeferredLogits` for as long as a framework's method runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor

from rlhf_fast.integrations.declining import tell
from rlhf_fast.integrations.deferred import DeferredLogits


@contextlib.contextmanager
def deferred_heads(*models: nn.Module | None) -> Iterator[None]:
    """Within the block these models return `DeferredLogits`, if their heads allow it."""
    heads = {}
    for model in models:
        head, reason = (None, "") if model is None else plain_head(model)
        if reason:
            tell(f"{type(model).__name__} computes all its logits", reason)
        elif head is not None and not _is_waiting(head):
            heads[id(head)] = head
    for head in heads.values():
        head.forward = functools.partial(_wait, head)
    try:
        yield
    finally:
        for head in heads.values():
            del head.forward


def _wait(head: nn.Linear, hidden) -> DeferredLogits:
    return DeferredLogits(hidden, head.weight, head.bias)


def _is_waiting(head: nn.Linear) -> bool:
    return getattr(vars(head).get("forward"), "func", None) is _wait


def plain_head(model: nn.Module) -> tuple[nn.Linear | None, str]:
    """The output embedding, if its weight can also be read outside the model's forward; or why not.

    Not so are adapters and quantised heads, weights that are sharded (FSDP, ZeRO-3) or offloaded,
    and wrappers that look into the output: these keep computing logits.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        if isinstance(model, nn.DataParallel) or getattr(model, "find_unused_parameters", False):
            return None, "DataParallel, and DDP with find_unused_parameters, look into its output"
        model = model.module
    if hasattr(model, "_orig_mod"):
        return None, "it is compiled"
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        kind = type(head).__name__
        return None, f"its output embedding must be a plain torch.nn.Linear, got {kind}"
    if "forward" in vars(head) and not _is_waiting(head):
        return None, "its output embedding has a forward of its own, as with offloading"
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features) and not hasattr(weight, "ds_id")
    if not whole or isinstance(weight, DTensor) or weight.is_meta:
        return None, "the weight of its output embedding is sharded or offloaded"
    return head, ""
