"""How responses are sampled, for every backend alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_fast.errors import UserError
from rlhf_fast.types import Prompt


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of responses."""

    temperature: float = 1.0
    """Softmax temperature; 0 decodes greedily."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep only this many most likely tokens; 0 keeps all."""
    max_new_tokens: int = 1024
    """Token limit of a response."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"sampling.temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"sampling.top_k must be >= 0, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens must be >= 1, got {self.max_new_tokens}")


def check_finite(logps: Sequence[float | None], backend: str, prompt: Prompt) -> None:
    """Refuses a response of a model whose logits were not finite; JSON may have none for them."""
    if None in logps or not all(map(math.isfinite, logps)):
        raise UserError(
            f"{backend}: logits must be finite, got logits that are not, at a prompt like "
            f"{prompt.id!r}: the weights have diverged or are damaged; lower the learning "
            f"rate, or take generation.dtype float32"
        )
