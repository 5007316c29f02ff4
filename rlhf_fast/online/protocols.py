"""The plug-in points of the loop; scorers have theirs in rewards/scorer.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlhf_fast.types import Group, PreferencePair, Prompt, ScoredGroup


class Generator(Protocol):
    """Samples responses from the current policy."""

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]: ...

    def load_weights(self, policy: Policy) -> None:
        """The next call samples from `policy`."""


class Policy(Protocol):
    """The model that learns."""

    def update(
        self, selected: Sequence[PreferencePair] | Sequence[ScoredGroup], *, seed: int
    ) -> list[dict[str, float]]:
        """One round of training; returns metrics per optimiser step."""

    def kl(self, groups: Sequence[Group]) -> float:
        """Mean over responses of log pi(y|x) - log pi_ref(y|x), in nats."""

    def move_reference(self) -> None:
        """Makes the present policy the reference."""

    def average_reference(self, path: Any, decay: float) -> None:
        """Moves the reference towards the policy and saves it."""

    def load_reference(self, path: Any) -> None: ...

    def save(self, path: Any, **options: Any) -> None: ...

    def load(self, path: Any) -> None: ...
