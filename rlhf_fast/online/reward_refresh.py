"""When and from what the run's reward model is trained again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rlhf_fast.errors import UserError


@dataclass(frozen=True)
class RefreshConfig:
    """Training the reward model again in every iteration, with pairs of the policy's samples.

    It starts from the SFT model and learns from all pairs so far. The evaluation keeps to the
    first reward model, so that iterations can be compared.
    """

    labels: Literal["own", "labeller"] | None = None
    """Who labels the samples: own, the last reward model, where it is sure (self-evolved rewards,
    arXiv 2411.00418); labeller, reward.labeller. None: it stays as it is."""
    confidence: float = 0.75
    """With own: least probability that a pair's chosen response is the better one."""

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise UserError(f"reward.refresh.confidence must be in (0.5, 1), got {self.confidence}")

    @property
    def min_gap(self) -> float:
        """The difference of rewards at which Bradley-Terry gives `confidence`."""
        return math.log(self.confidence / (1 - self.confidence))
