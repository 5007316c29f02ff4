"""What happens to a reward before the policy sees it: baselines, bounds, penalties."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.compose import UNCONSTRAINED
from rlhf_fast.rewards.scorer import Scorer, is_relative, score_against
from rlhf_fast.types import Group, ScoredGroup

StepReduction = Literal["sum", "mean", "min", "last", "clip", "delta"]


@dataclass(frozen=True)
class ShapingConfig:
    """Changes to the reward, applied in the order of these fields."""

    baseline_samples: int = 0
    """Subtract the mean reward of this many responses of the SFT model to the same prompt
    (contrastive rewards, arXiv 2403.07708); 0 subtracts nothing."""
    calibrated: bool = False
    """Then take the sigmoid: the probability of beating the baseline (CGPO, arXiv 2409.20370)."""
    standardised: bool = False
    """Subtract each prompt's mean and divide by its standard deviation."""
    lowest: float | None = None
    """Rewards below are raised to this."""
    highest: float | None = None
    """Rewards above are lowered to this."""
    length_penalty: float = 0.0
    """Subtracted per response token."""
    unfinished_penalty: float = 0.0
    """Subtracted from responses that the token limit cut (arXiv 2403.17031 uses a fixed low
    reward)."""

    def __post_init__(self) -> None:
        if self.baseline_samples < 0:
            raise UserError(
                f"reward.shaping.baseline_samples must be >= 0, got {self.baseline_samples}"
            )
        if self.calibrated and not self.baseline_samples:
            raise UserError("reward.shaping.calibrated needs baseline_samples >= 1, got 0")
        low, high = self.lowest, self.highest
        if low is not None and high is not None and low >= high:
            raise UserError(f"reward.shaping: lowest must be < highest, got {low} and {high}")


class ShapedScorer:
    """Shapes the rewards of another scorer; the raw rewards stay as the component `raw`."""

    def __init__(
        self, scorer: Scorer, config: ShapingConfig, baseline: Mapping[str, float] | None = None
    ) -> None:
        self.scorer = scorer
        self.config = config
        self.baseline = baseline or {}

    @property
    def is_relative(self) -> bool:
        return is_relative(self.scorer)

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        return [self._shaped(group) for group in self.scorer.score(groups)]

    def score_against(
        self, groups: Sequence[Group], opponents: Sequence[Group]
    ) -> list[ScoredGroup]:
        """`WINS` are those of the rewards before they are shaped."""
        return [self._shaped(group) for group in score_against(self.scorer, groups, opponents)]

    def unstandardised(self) -> ShapedScorer:
        """Without standardising and what follows it, which hides how policies differ."""
        if not self.config.standardised:
            return self
        before = ShapingConfig(self.config.baseline_samples, self.config.calibrated)
        return ShapedScorer(self.scorer, before, self.baseline)

    def _shaped(self, group: ScoredGroup) -> ScoredGroup:
        config, rewards = self.config, group.rewards
        if config.baseline_samples:
            rewards = contrastive(rewards, self._baseline_of(group))
        if config.calibrated:
            rewards = calibrated(rewards)
        if config.standardised:
            rewards = standardised(rewards)
        rewards = clipped(rewards, config.lowest, config.highest)
        lengths = [len(c.token_ids) for c in group.completions]
        rewards = length_penalised(rewards, lengths, config.length_penalty)
        finished = [c.finished for c in group.completions]
        rewards = [r if f else r - config.unfinished_penalty for r, f in zip(rewards, finished)]
        components = {**group.components, "raw": group.rewards}
        return replace(group, rewards=rewards, components=components)

    def _baseline_of(self, group: ScoredGroup) -> float:
        if group.prompt.id not in self.baseline:
            raise UserError(f"prompt {group.prompt.id!r} has no baseline reward")
        return self.baseline[group.prompt.id]


def mean_baseline(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Each prompt's mean reward; what violates a constraint counts as if it did not.

    The violation's reward, far below all others, would push those of all other responses up alike.
    """
    return {
        group.prompt.id: statistics.fmean(group.components.get(UNCONSTRAINED, group.rewards))
        for group in scored
    }


def contrastive(rewards: Sequence[float], baseline: float) -> list[float]:
    """`r(x, y) - mean_j r(x, y_j)` over the baseline's responses (arXiv 2403.07708)."""
    return [r - baseline for r in rewards]


def calibrated(differences: Sequence[float]) -> list[float]:
    """`sigmoid(r(x, y) - r(x, baseline))` (CGPO, arXiv 2409.20370)."""
    return [1 / (1 + math.exp(-max(d, -700.0))) for d in differences]


def standardised(rewards: Sequence[float]) -> list[float]:
    """Zero mean and unit (population) deviation; equal rewards become zeros."""
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(r - mean) / deviation if deviation > 0 else 0.0 for r in rewards]


def clipped(
    rewards: Sequence[float], lowest: float | None = None, highest: float | None = None
) -> list[float]:
    low, high = -math.inf if lowest is None else lowest, math.inf if highest is None else highest
    return [min(max(r, low), high) for r in rewards]


def length_penalised(
    rewards: Sequence[float], num_tokens: Sequence[int], penalty: float
) -> list[float]:
    """`r - penalty * tokens`; for a verbosity bias of the reward model."""
    return [r - penalty * n for r, n in zip(rewards, num_tokens)]


def clip_steps(steps: Sequence[float], limit: float) -> list[float]:
    """`min(r_t - limit, 0)`: bounded above, so more steps cannot raise the sum.

    Source: arXiv 2410.15115 ("Clip").
    """
    return [min(r - limit, 0.0) for r in steps]


def delta_steps(steps: Sequence[float]) -> list[float]:
    """`r_t - r_{t+1}`, and the last step's own reward: the sum telescopes to the first step's.

    Source: arXiv 2410.15115 ("Delta").
    """
    return [r - following for r, following in zip(steps, [*steps[1:], 0.0])]


def reduce_steps(steps: Sequence[float], reduction: StepReduction, limit: float = 0.0) -> float:
    """One reward from the rewards of a response's steps; a response without steps gets 0."""
    if not steps:
        return 0.0
    if reduction == "clip":
        return sum(clip_steps(steps, limit))
    if reduction == "delta":
        return sum(delta_steps(steps))
    functions = {"sum": sum, "mean": statistics.fmean, "min": min, "last": lambda s: s[-1]}
    return float(functions[reduction](steps))
