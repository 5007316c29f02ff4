"""Pure functions from scored groups to preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.types import PreferencePair, ScoredGroup


class BestVsWorst:
    """The best response against the worst one of each prompt; equal rewards give no pair.

    Of several best (or worst) responses the first is taken. Source: arXiv 2405.07863, section 3.
    """

    min_generations = 2

    def select(self, scored: Sequence[ScoredGroup]) -> list[PreferencePair]:
        pairs = []
        for group in scored:
            best = max(range(len(group.rewards)), key=lambda i: (group.rewards[i], -i))
            worst = min(range(len(group.rewards)), key=lambda i: (group.rewards[i], i))
            if group.rewards[best] > group.rewards[worst]:
                pairs.append(
                    PreferencePair(
                        group.completions[best],
                        group.completions[worst],
                        group.rewards[best],
                        group.rewards[worst],
                    )
                )
        return pairs


SELECTORS = {"best_vs_worst": BestVsWorst}
