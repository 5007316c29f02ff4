"""Where a replacement leaves a call to the framework's own code, the user is told once, and why."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)
told: set[tuple[str, str]] = set()


def declined(original, reason: object):
    """`original`, to be called in place of ours; the reason is told at the first time."""
    function = getattr(original, "__self__", original)  # a bound `apply`: its class has the name
    tell(f"{function.__module__}.{function.__qualname__} runs its own code", reason)
    return original


def tell(what: str, reason: object) -> None:
    """Logged, as LLaMA-Factory's trainers switch warnings off."""
    if torch.compiler.is_compiling() or (what, str(reason)) in told:
        return
    told.add((what, str(reason)))
    logger.warning("rlhf_fast: %s: %s", what, reason)
