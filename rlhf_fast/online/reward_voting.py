"""Preference pairs corrected by the vote of several reward models (arXiv 2401.06080, section 2)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_fast.data import TextPair
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Scorer
from rlhf_fast.training.reward_config import RewardTrainingConfig
from rlhf_fast.types import Completion

Correction = Literal["flip", "soft", "margin"]


@dataclass(frozen=True)
class VoteConfig:
    """What several reward models correct in the pairs before the reward model learns from them."""

    corrections: tuple[Correction, ...] = ()
    """flip: pairs that they mostly see the other way round are turned. soft: the label becomes
    their mean probability that the chosen response is better. margin: the chosen reward is to
    exceed the other by their mean difference. soft and margin see turned pairs as turned."""
    models: tuple[str, ...] = ()
    """Directories or hub names of the reward models."""
    members: int = 0
    """Instead, so many are trained on bootstrap samples of the pairs."""
    flip_deviations: float = 0.0
    """With flip: the mean difference must be below 0 by this many standard deviations."""

    def __post_init__(self) -> None:
        if self.members < 0 or self.flip_deviations < 0:
            raise UserError(
                f"vote: members and flip_deviations must be >= 0, got {self.members} and "
                f"{self.flip_deviations}"
            )
        if bool(self.corrections) != bool(self.models or self.members) or (
            self.models and self.members
        ):
            raise UserError("vote: corrections go with either models or members")

    def check_objective(self, training: RewardTrainingConfig) -> None:
        if training.objective not in ("pairs", "segments"):
            raise UserError(
                f"vote: margins and labels are of objective pairs or segments, got "
                f"{training.objective}"
            )


def differences(scorers: Iterable[Scorer], pairs: Sequence[TextPair]) -> list[list[float]]:
    """Per scorer and pair the reward of the chosen response minus that of the rejected one.

    An iterator of scorers is asked for the next one when the last has scored all pairs.
    """
    groups = [
        [
            Completion(p.prompt, text, [], [], finished)
            for text, finished in zip((p.chosen, p.rejected), p.finished)
        ]
        for p in pairs
    ]
    return [[chosen - rejected for chosen, rejected in _rewards(s, groups)] for s in scorers]


def _rewards(scorer: Scorer, groups: list[list[Completion]]) -> Iterable[list[float]]:
    return (group.rewards for group in scorer.score(groups))


def corrected(pair: TextPair, opinions: Sequence[float], config: VoteConfig) -> TextPair:
    """The pair as the vote of `opinions`, its differences, makes it (arXiv 2401.06080, eq. 4)."""
    mean, deviation = statistics.fmean(opinions), statistics.pstdev(opinions)
    if "flip" in config.corrections and mean < -config.flip_deviations * deviation:
        mean, opinions = -mean, [-x for x in opinions]
        turned = {"chosen": pair.rejected, "rejected": pair.chosen, "margin": 0.0}
        pair = replace(pair, **turned, finished=pair.finished[::-1])
    if "soft" in config.corrections:
        probabilities = [1 / (1 + math.exp(min(-x, 700.0))) for x in opinions]
        pair = replace(pair, target=statistics.fmean(probabilities))
    return replace(pair, margin=mean) if "margin" in config.corrections else pair


def all_corrected(
    pairs: Sequence[TextPair], opinions: Sequence[Sequence[float]], config: VoteConfig
) -> list[TextPair]:
    """Every pair by its column of `opinions`, one row per reward model."""
    return [corrected(pair, column, config) for pair, column in zip(pairs, zip(*opinions))]
