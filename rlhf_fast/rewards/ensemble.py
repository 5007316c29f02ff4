"""Several scorers as one: reducers that are cautious where the scorers disagree."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rlhf_fast.rewards.scorer import Scorer, is_relative, scores_alone
from rlhf_fast.types import Group, ScoredGroup

Reduction = Literal["mean", "min", "uwo", "lcb", "robust"]


def mean(values: Sequence[float], coefficient: float = 0.0) -> float:
    """The average opinion."""
    return statistics.fmean(values)


def minimum(values: Sequence[float], coefficient: float = 0.0) -> float:
    """The most pessimistic opinion: WCO, worst-case optimisation (arXiv 2310.02743)."""
    return min(values)


def uncertainty_weighted(values: Sequence[float], coefficient: float) -> float:
    """`mean - coefficient * variance`: UWO (arXiv 2310.02743; population variance)."""
    return statistics.fmean(values) - coefficient * statistics.pvariance(values)


def lower_confidence_bound(values: Sequence[float], coefficient: float) -> float:
    """`mean - coefficient * standard deviation` (arXiv 2401.16635; population deviation)."""
    return statistics.fmean(values) - coefficient * statistics.pstdev(values)


def robust(values: Sequence[float], coefficient: float) -> float:
    """`(1 - coefficient) * mean + coefficient * min`: between nominal and worst case.

    Source: reward-robust RLHF, arXiv 2409.15360, with the mean as the nominal reward.
    """
    return (1 - coefficient) * statistics.fmean(values) + coefficient * min(values)


REDUCTIONS: dict[str, Callable[[Sequence[float], float], float]] = {
    "mean": mean,
    "min": minimum,
    "uwo": uncertainty_weighted,
    "lcb": lower_confidence_bound,
    "robust": robust,
}


class EnsembleScorer:
    """Scores with every member and reduces each response's opinions to one reward.

    The members' rewards stay with the result as components, so disagreement can be looked at.
    Members must speak about the same scale: reward models trained alike do.
    """

    def __init__(
        self, members: Mapping[str, Scorer], reduction: Reduction, *, coefficient: float = 1.0
    ) -> None:
        self.members = members
        self.reduction = reduction
        self.coefficient = coefficient

    @property
    def is_relative(self) -> bool:
        return any(map(is_relative, self.members.values()))

    @property
    def scores_alone(self) -> bool:
        return all(map(scores_alone, self.members.values()))

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        opinions = {name: member.score(groups) for name, member in self.members.items()}
        reduce = REDUCTIONS[self.reduction]
        result = []
        for index, group in enumerate(groups):
            components = {name: scored[index].rewards for name, scored in opinions.items()}
            rewards = [reduce(values, self.coefficient) for values in zip(*components.values())]
            result.append(ScoredGroup(group[0].prompt, list(group), rewards, components))
        return result
