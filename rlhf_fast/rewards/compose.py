"""Several rewards combined into one, as pure functions of one prompt's rewards and as a scorer.

`parts` are lists of rewards, one list per part, each with one reward per response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.scorer import Scorer, finite, is_relative, scores_alone
from rlhf_fast.types import Group, Prompt, ScoredGroup

UNCONSTRAINED = "unconstrained"
"""Component of the rewards before constraints are applied, where there are any."""
Combination = Literal["weighted", "gated", "hierarchical", "ranked"]
Rewards = Sequence[float]


def weighted(parts: Sequence[Rewards], weights: Sequence[float]) -> list[float]:
    """`sum_k weights[k] * parts[k]`; with weights from a gate over the prompt, ArmoRM's score."""
    return [sum(w * r for w, r in zip(weights, rewards)) for rewards in zip(*parts)]


def hierarchical(
    parts: Sequence[Rewards], weights: Sequence[float], threshold: float
) -> list[float]:
    """The first part decides; the others count only where it reaches `threshold`.

    Source: ALaRM, arXiv 2403.06754: aspect rewards join the holistic one once it is
    good enough, so they cannot make up for a bad response.
    """
    first, *others = parts
    extra = weighted(others, weights[1:]) if others else [0.0] * len(first)
    return [weights[0] * r + (e if r >= threshold else 0.0) for r, e in zip(first, extra)]


def ranked(parts: Sequence[Rewards], margins: Sequence[float]) -> list[float]:
    """The share of the other responses that each one beats, an even meeting counting one half.

    Of two responses the first part decides whose rewards differ by more than its margin; where
    none does they are even. Source: the decision tree of HERON, arXiv 2309.02632.
    """
    responses = list(zip(*parts))

    def meeting(ours: Sequence[float], theirs: Sequence[float]) -> float:
        clear = (x > y for x, y, margin in zip(ours, theirs, margins) if abs(x - y) > margin)
        return float(next(clear, 0.5))

    others = len(responses) - 1
    # Each one's meeting with itself is even and taken off again.
    wins = [sum(meeting(ours, theirs) for theirs in responses) - 0.5 for ours in responses]
    return [w / others if others else 0.5 for w in wins]


def constrained(
    rewards: Rewards, parts: Sequence[Rewards], thresholds: Sequence[float], violation: float
) -> list[float]:
    """Rewards where every constraint reaches its threshold, `violation` elsewhere.

    Source: CGPO's mixture of judges, arXiv 2409.20370.
    """
    kept = [all(v >= t for v, t in zip(values, thresholds)) for values in zip(*parts)]
    return [r if ok else violation for r, ok in zip(rewards, kept)] if parts else list(rewards)


@dataclass(frozen=True)
class Part:
    """One reward of a composition."""

    scorer: Scorer
    weight: float = 1.0
    is_constraint: bool = False
    """A constraint is not added: a response below `threshold` gets the violation reward."""
    threshold: float = 0.0
    margin: float = 0.0
    """Of a ranked combination: differences up to this one decide nothing."""


class ComposedScorer:
    """Scores with every part and combines; parts keep their rewards as components.

    `gate(prompt) -> weights`, one per reward part, replaces the fixed weights (`gated`).
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        combination: Combination = "weighted",
        *,
        gate: Callable[[Prompt], Sequence[float]] | None = None,
        threshold: float = 0.0,
        violation: float = 0.0,
    ) -> None:
        self.parts = parts
        self.combination = combination
        self.gate = gate
        self.threshold = threshold
        self.violation = violation
        self.rewards = [name for name, part in parts.items() if not part.is_constraint]
        self.constraints = [name for name, part in parts.items() if part.is_constraint]
        if not self.rewards:
            raise UserError("reward.parts: at least one part must not be a constraint")

    @property
    def is_relative(self) -> bool:
        parts = (is_relative(part.scorer) for part in self.parts.values())
        return self.combination == "ranked" or any(parts)

    @property
    def scores_alone(self) -> bool:
        parts = (scores_alone(part.scorer) for part in self.parts.values())
        return self.gate is None and all(parts)

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        scored = {name: part.scorer.score(groups) for name, part in self.parts.items()}
        result = []
        for index, group in enumerate(groups):
            components = {name: groups[index].rewards for name, groups in scored.items()}
            rewards = self._combined(group[0].prompt, components)
            if self.constraints:
                components[UNCONSTRAINED] = rewards
                rewards = self._constrained(rewards, components)
            parts = {name: groups[index] for name, groups in scored.items()}
            shares = self._token_rewards(parts)
            result.append(ScoredGroup(group[0].prompt, list(group), rewards, components, shares))
        return result

    def _token_rewards(self, parts: Mapping[str, ScoredGroup]) -> list[list[float]] | None:
        """The weighted sum of what the parts gave to single tokens."""
        names = [name for name in self.rewards if parts[name].token_rewards is not None]
        if not names:
            return None
        if self.combination != "weighted":
            raise UserError("reward.parts with rewards of tokens go with combination weighted")
        weights = [self.parts[name].weight for name in names]
        rows = zip(*(parts[name].token_rewards for name in names))
        return [weighted(tokens, weights) for tokens in rows]

    def _combined(self, prompt: Prompt, components: Mapping[str, list[float]]) -> list[float]:
        parts = [components[name] for name in self.rewards]
        weights = [self.parts[name].weight for name in self.rewards]
        if self.combination == "gated":
            weights = self._gates(prompt)
        if self.combination == "hierarchical":
            return hierarchical(parts, weights, self.threshold)
        if self.combination == "ranked":
            return ranked(parts, [self.parts[name].margin for name in self.rewards])
        return weighted(parts, weights)

    def _constrained(
        self, rewards: list[float], components: Mapping[str, list[float]]
    ) -> list[float]:
        return constrained(
            rewards,
            [components[name] for name in self.constraints],
            [self.parts[name].threshold for name in self.constraints],
            self.violation,
        )

    def _gates(self, prompt: Prompt) -> list[float]:
        gates = finite([float(g) for g in self.gate(prompt)], "reward.composition.gate", prompt)
        if len(gates) != len(self.rewards):
            raise UserError(
                f"reward.composition.gate must return one weight for each of "
                f"{', '.join(self.rewards)}, got {len(gates)} on prompt {prompt.id!r}"
            )
        return gates
