"""What every scorer offers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from rlhf_fast.errors import UserError
from rlhf_fast.types import Group, Prompt, ScoredGroup


class Scorer(Protocol):
    """Gives every response of every group one finite number."""

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]: ...


def finite(values: list[float], source: str, prompt: Prompt) -> list[float]:
    """The values, unless one of them is infinite or not a number."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"{source} gave {values} on prompt {prompt.id!r}; try precision fp32 or another one"
        )
    return values
