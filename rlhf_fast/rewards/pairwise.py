"""Rewards from pairwise comparisons: every response meets every other, or a knock-out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Literal, Protocol

from rlhf_fast.rewards.scorer import WINS, beside
from rlhf_fast.types import Completion, Group, ScoredGroup

MEETINGS = 1024
"""Compared at a time: each becomes a text of its own with prompt and both responses."""
Meeting = tuple[Completion, Completion]
Ranking = Literal["round_robin", "tournament", "opponents"]


class Comparer(Protocol):
    """Judges pairs of responses to one prompt, in the order in which they are shown."""

    def compare(self, meetings: Sequence[Meeting]) -> list[float]:
        """Probability that the first response of each meeting is the better one."""


def compare_both_orders(comparer: Comparer, meetings: Sequence[Meeting]) -> list[float]:
    """Averages over both orders, which cancels a preference for one position.

    Source: arXiv 2405.07863, section 2.2; position swap of arXiv 2309.00267.
    """
    result = []
    for start in range(0, len(meetings), MEETINGS):
        shown = meetings[start : start + MEETINGS]
        probabilities = comparer.compare([*shown, *((b, a) for a, b in shown)])
        forward, backward = probabilities[: len(shown)], probabilities[len(shown) :]
        result += [(p + 1 - q) / 2 for p, q in zip(forward, backward)]
    return result


class PairwiseScorer:
    """A response's reward is its mean winning probability, or the rounds it survives.

    `round_robin` compares all K (K - 1) / 2 pairs and gives rewards in [0, 1]; `opponents` only
    pairs of different sources, the policy against the mixture that Nash-MD plays (arXiv
    2312.00886; a response without opponent gets 1/2); `tournament` makes
    K - 1 comparisons, and the reward is the number of rounds won (a bye counts as a win, an even
    comparison goes to the earlier response). Every comparison is made in both orders.
    """

    is_relative = True

    def __init__(self, comparer: Comparer, ranking: Ranking = "round_robin") -> None:
        self.comparer = comparer
        self.ranking = ranking

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        rank = self._tournament if self.ranking == "tournament" else self._round_robin
        return [ScoredGroup(g[0].prompt, list(g), r) for g, r in zip(groups, rank(groups))]

    def score_against(
        self, groups: Sequence[Group], opponents: Sequence[Group]
    ) -> list[ScoredGroup]:
        """The rewards, and `WINS`, are mean winning probabilities against the opponents."""
        both = [beside(ours, theirs) for ours, theirs in zip(groups, opponents)]
        met = PairwiseScorer(self.comparer, "opponents").score(both)
        result = []
        for scored, group in zip(met, groups):
            rewards = scored.rewards[: len(group)]
            result.append(ScoredGroup(scored.prompt, list(group), rewards, {WINS: rewards}))
        return result

    def _round_robin(self, groups: Sequence[Group]) -> list[list[float]]:
        places = [
            (g, i, j)
            for g, group in enumerate(groups)
            for i, j in itertools.combinations(range(len(group)), 2)
            if self.ranking == "round_robin" or group[i].source != group[j].source
        ]
        meetings = [(groups[g][i], groups[g][j]) for g, i, j in places]
        wins: list[list[list[float]]] = [[[] for _ in group] for group in groups]
        for (g, i, j), p in zip(places, compare_both_orders(self.comparer, meetings)):
            wins[g][i].append(p)
            wins[g][j].append(1 - p)
        return [[statistics.fmean(w) if w else 0.5 for w in group] for group in wins]

    def _tournament(self, groups: Sequence[Group]) -> list[list[float]]:
        rewards = [[0.0] * len(group) for group in groups]
        left = [list(range(len(group))) for group in groups]
        while any(len(players) > 1 for players in left):
            places = [
                (g, players[k], players[k + 1])
                for g, players in enumerate(left)
                for k in range(0, len(players) - 1, 2)
            ]
            meetings = [(groups[g][i], groups[g][j]) for g, i, j in places]
            winners: list[list[int]] = [
                players[-1:] if len(players) % 2 else [] for players in left
            ]
            rounds = compare_both_orders(self.comparer, meetings)
            for (g, i, j), p in reversed(list(zip(places, rounds))):
                winners[g].insert(0, i if p >= 0.5 else j)
            for g, players in enumerate(left):
                if len(players) > 1:
                    for i in winners[g]:
                        rewards[g][i] += 1.0
            left = winners
        return rewards
