"""Where a run's rewards come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from rlhf_fast.errors import UserError
from rlhf_fast.online.reward_refresh import RefreshConfig
from rlhf_fast.online.reward_voting import VoteConfig
from rlhf_fast.rewards.config import CompositionConfig, EnsembleConfig, PartConfig, SourceConfig
from rlhf_fast.rewards.shaping import ShapingConfig
from rlhf_fast.training.reward_config import RewardTrainingConfig

KIND = (
    *("objective", "num_outputs", "members"),
    *("label_smoothing", "label_update_rate", "contrastive_weight"),
)
"""Settings of the training that say what kind of reward model there is, not how it is fitted."""


@dataclass(frozen=True)
class RewardConfig(SourceConfig):
    """Where rewards come from: one ready source, a model trained in this run, or several."""

    pairs: str | None = None
    """Preference pairs (`prompt`, `chosen`, `rejected`) to train a reward model on."""
    scores: str | None = None
    """Scored responses (`prompt`, `response` or `responses`, `score` or `scores`) to train a reward
    model on, by the objectives attributes, quantiles, rankings and binary; with `pairs` beside
    them, attributes get a gate."""
    labeller: str | None = None
    """module:function that stands for human judgement: it ranks samples of the SFT model, and a
    reward model is trained on the resulting pairs."""
    labelled_samples_per_prompt: int = 6
    """Samples per prompt that the labeller sees."""
    labelled_min_gap: float = 0.25
    """Smallest difference between two labels that makes a pair."""
    labelled_max_pairs_per_prompt: int = 8
    """Most pairs taken from one prompt, widest gaps first."""
    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    """How the reward model is trained (with `pairs` or `labeller`)."""
    vote: VoteConfig = field(default_factory=VoteConfig)
    """What other reward models correct in the pairs beforehand (with `pairs` or `labeller`)."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """Training it again in every iteration (with `pairs` or `labeller`)."""
    models: tuple[str, ...] = ()
    """Directories or hub names of reward models that form an ensemble."""
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    """How the ensemble's opinions become one reward."""
    parts: Annotated[tuple[PartConfig, ...], tyro.conf.Suppress] = ()
    """Rewards to be combined; given in a YAML file."""
    composition: CompositionConfig = field(default_factory=CompositionConfig)
    """How the parts are combined."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """Baselines, bounds and penalties."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"samples_per_prompt": 2, "min_gap": 0, "max_pairs_per_prompt": 1}
        for name, bound in least.items():
            if (value := getattr(self, f"labelled_{name}")) < bound:
                raise UserError(f"reward.labelled_{name} must be >= {bound}, got {value}")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise UserError(f"reward.parts: names must differ, got {', '.join(names)}")

    @property
    def trains(self) -> bool:
        """Whether the run trains a reward model."""
        return bool(self.pairs or self.scores or self.labeller)

    def model_names(self, prefix: str = "reward") -> dict[str, str]:
        names = super().model_names(prefix)
        names |= {f"{prefix}.models[{i}]": name for i, name in enumerate(self.models)}
        names |= {f"{prefix}.vote.models[{i}]": name for i, name in enumerate(self.vote.models)}
        for i, part in enumerate(self.parts):
            names |= part.model_names(f"{prefix}.parts[{i}]")
        return names

    def sources(self) -> list[str]:
        names = super().sources()
        return [name for name in names if name != "pairs" or "scores" not in names]

    @property
    def compares(self) -> bool:
        return super().compares or (self.trains and self.training.objective == "pairwise")

    @property
    def _is_learned(self) -> bool:
        """Whether the reward is a model that was, or will be, trained on judgements."""
        return bool(self.trains or self.model or self.models or self.pairwise_model)

    def check_used(self) -> None:
        """Raises if a setting belongs to another source than the one that is given."""
        super().check_used()
        for part in self.parts:
            part.check_used()
        plain = RewardTrainingConfig()
        kind = [f for f in KIND if getattr(self.training, f) != getattr(plain, f)]
        several = bool(self.trains or self.model or self.models)
        self._refuse("composition", self.composition != CompositionConfig(), self.parts, "parts")
        self._refuse("ensemble", self.ensemble != EnsembleConfig(), several, "reward models")
        self._refuse(f"training.{''.join(kind[:1])}", kind, self._is_learned, "reward models")
        votes, from_pairs = self.vote.corrections, self.pairs or self.labeller
        self._refuse("vote", votes, from_pairs, "pairs or labeller")
        self._refuse("refresh", self.refresh.labels, from_pairs, "pairs or labeller")
        if self.refresh.labels:
            self._check_refresh()
        if votes:
            self.vote.check_objective(self.training)
        if self.trains:
            self._check_members()

    def _check_refresh(self) -> None:
        if self.refresh.labels == "labeller" and not self.labeller:
            raise UserError("reward.refresh.labels labeller needs reward.labeller")
        objective, members = self.training.objective, self.ensemble.members
        if objective not in ("pairs", "segments") or members > 1:
            raise UserError(
                f"reward.refresh is of one reward model of objective pairs or segments, got "
                f"{members} of {objective}"
            )
        if self.shaping.baseline_samples:
            raise UserError(
                "reward.refresh: the baseline's rewards are those of the first reward model; leave "
                "reward.shaping.baseline_samples at 0"
            )

    def _check_members(self) -> None:
        """A reduction needs several opinions, of heads, adapters or models."""
        training, ensemble = self.training, self.ensemble
        if training.objective == "segments" and ensemble.members > 1:
            raise UserError("reward objective segments takes reward.ensemble.members 1")
        outputs = training.num_outputs if training.objective != "attributes" else 2
        if ensemble.reduction != "mean" and ensemble.members == outputs == 1:
            raise UserError(
                f"reward.ensemble.reduction {ensemble.reduction} needs several opinions: give "
                f"reward.ensemble.members >= 2, or reward.training.num_outputs >= 2"
            )
        if ensemble.reduction != "mean" and ensemble.members == 1 and self.pairs and self.scores:
            raise UserError(
                f"reward.ensemble.reduction {ensemble.reduction} takes the attributes without the "
                f"gate that reward.pairs train; leave out one of them"
            )
