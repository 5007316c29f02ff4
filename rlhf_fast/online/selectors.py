"""Pure functions from scored groups to preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.types import PreferencePair, ScoredGroup


class BestVsWorst:
    """The best response against the worst one of each prompt; equal rewards give no pair.

    With `pairs_per_prompt` = m also the second best against the second worst, and so on: each
    response is used once. Among equal rewards the earlier response ranks higher.
    Source: arXiv 2405.07863, section 3 (m = 1).
    """

    def __init__(self, pairs_per_prompt: int = 1) -> None:
        self.pairs_per_prompt = pairs_per_prompt

    def select(self, scored: Sequence[ScoredGroup]) -> list[PreferencePair]:
        return [pair for group in scored for pair in self._pairs(group)]

    def _pairs(self, group: ScoredGroup) -> list[PreferencePair]:
        rewards = group.rewards
        ranking = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))
        count = min(self.pairs_per_prompt, len(ranking) // 2)
        return [
            PreferencePair(group.completions[i], group.completions[j], rewards[i], rewards[j])
            for i, j in zip(ranking[:count], reversed(ranking))
            if rewards[i] > rewards[j]
        ]


SELECTORS = {"best_vs_worst": BestVsWorst}
