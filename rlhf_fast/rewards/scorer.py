"""What every scorer offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlhf_fast.types import Group, ScoredGroup


class Scorer(Protocol):
    """Gives every response of every group one finite number."""

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]: ...
