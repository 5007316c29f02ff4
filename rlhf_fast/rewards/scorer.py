"""What every scorer offers, and how scorers that only compare tell one policy from another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from rlhf_fast.errors import UserError
from rlhf_fast.launch import Launch
from rlhf_fast.types import Group, Prompt, ScoredGroup

WINS = "wins"
"""Component of responses scored against others: the share of its meetings that each one wins."""
OPPONENT = "opponent"
"""Source of those others."""


class Scorer(Protocol):
    """Gives every response of every group one finite number."""

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]: ...


def is_relative(scorer: Scorer) -> bool:
    """Whether rewards compare the responses of one group and say nothing beyond it."""
    return getattr(scorer, "is_relative", False)


def scores_alone(scorer: Scorer) -> bool:
    """Whether a group's rewards are the same whatever is scored with it, before or elsewhere.

    Functions and judges may count calls, draw numbers and cost money: they never say so.
    """
    return getattr(scorer, "scores_alone", False)


def score_together(scorer: Scorer, groups: Sequence[Group], launch: Launch) -> list[ScoredGroup]:
    """The scored groups, in every process of a launch.

    Each computes a share where rewards of a group depend on nothing else; else the main one all.
    """
    if scores_alone(scorer):
        return launch.share(groups, scorer.score)
    return launch.on_main(lambda: scorer.score(groups))


def beside(group: Group, opponents: Group) -> Group:
    """One group of both, the opponents last and known by their source."""
    return [*group, *(replace(c, source=OPPONENT) for c in opponents)]


def score_against(
    scorer: Scorer, groups: Sequence[Group], opponents: Sequence[Group]
) -> list[ScoredGroup]:
    """Scores each group together with another one to the same prompt; only the first comes back.

    For scorers that compare. The component `WINS` is the share of the other group's responses whose
    reward is lower, an equal one counting half, or what the scorer's own `score_against` gives.
    """
    if hasattr(scorer, "score_against"):
        return scorer.score_against(groups, opponents)
    both = scorer.score([beside(ours, theirs) for ours, theirs in zip(groups, opponents)])
    return [_first_part(scored, group) for scored, group in zip(both, groups)]


def _first_part(scored: ScoredGroup, group: Group) -> ScoredGroup:
    count = len(group)
    ours, theirs = scored.rewards[:count], scored.rewards[count:]
    wins = [statistics.fmean((x > y) + 0.5 * (x == y) for y in theirs) for x in ours]
    components = {name: values[:count] for name, values in scored.components.items()}
    return ScoredGroup(scored.prompt, list(group), ours, components | {WINS: wins})


def finite(values: list[float], source: str, prompt: Prompt) -> list[float]:
    """The values, unless one of them is infinite or not a number."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"{source} gave {values} on prompt {prompt.id!r}; try precision fp32 or another one"
        )
    return values
