"""Which scorer, and how several become one."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.compose import Combination
from rlhf_fast.rewards.ensemble import Reduction
from rlhf_fast.rewards.judge import JudgeConfig
from rlhf_fast.rewards.pairwise import Ranking
from rlhf_fast.rewards.rules import RuleConfig
from rlhf_fast.rewards.segments import Boundary
from rlhf_fast.rewards.shaping import StepReduction


@dataclass(frozen=True)
class SourceConfig:
    """One scorer."""

    function: str | None = None
    """module:function called as f(prompts, completions, finished, **columns) -> list of numbers."""
    per_token: bool = False
    """`function` is called with `completion_ids` too and returns for each response a list with one
    reward per token; the response's is their sum."""
    rule: RuleConfig = field(default_factory=RuleConfig)
    """A rule: right answers, formats, lengths, repetition."""
    model: str | None = None
    """Directory or hub name of a sequence-classification reward model."""
    segments: Boundary | None = None
    """With model: reads it at the end of every segment too, and each token's share of the reward is
    what its segment brought (Fine-Grained RLHF, arXiv 2306.01693). A model trained by objective
    segments knows its own."""
    entropy_threshold: float = 2.0
    """With segments entropy: a token begins a segment where the language model's entropy before it,
    in nats, is above this."""
    segment_model: str | None = None
    """With segments entropy: the language model."""
    pairwise_model: str | None = None
    """Directory or hub name of a language model that answers which response is better, A or B."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """A language model behind an OpenAI-compatible endpoint, or the policy itself."""
    strong_model: str | None = None
    """Language model whose log-probability is the reward, minus that of `weak_model`."""
    weak_model: str | None = None
    """See strong_model; without it the log-probability alone is the reward (sharpening, arXiv
    2412.01951)."""
    criteria: str | None = None
    """System message for strong_model alone: what is to be rewarded."""
    scale: float = 1.0
    """Factor on the log-probability, or density ratio, of strong_model and weak_model."""
    ranking: Ranking = "round_robin"
    """How pairwise comparisons become rewards."""
    steps: StepReduction | None = None
    """If set, `function` returns a list of step rewards per response, reduced like this (clip and
    delta: arXiv 2410.15115)."""
    step_limit: float = 0.0
    """With steps: clip, the bound of a step's reward."""

    def __post_init__(self) -> None:
        given = self.sources()
        if len(given) > 1:
            raise UserError(
                f"reward: give one of {_SOURCES}, got {', '.join(given)}; one that a recipe or "
                f"file brought is left out by `--reward.NAME None`"
            )
        if self.per_token and (self.steps or not self.function):
            raise UserError("reward.per_token goes with function, without steps")
        if (self.segments or self.segment_model) and not self.model:
            raise UserError("reward: segments and segment_model go with model")
        if self.weak_model and not self.strong_model:
            raise UserError("reward: weak_model goes with strong_model")

    def sources(self) -> list[str]:
        """Names of the sources that are given; at most one is allowed."""
        names = (
            "function",
            "model",
            "pairwise_model",
            "strong_model",
            "pairs",
            "labeller",
            "scores",
        )
        given = [name for name in (*names, "models", "parts") if getattr(self, name, None)]
        nested = {"rule": self.rule.kind, "judge": self.judge.is_given}
        return [*given, *(name for name, value in nested.items() if value)]

    @property
    def compares(self) -> bool:
        """Whether rewards come from comparisons of two responses."""
        return bool(self.pairwise_model or (self.judge.is_given and self.judge.mode == "compare"))

    def check_used(self) -> None:
        """Raises if a setting belongs to another source than the one that is given."""
        self._refuse("steps", self.steps, self.function, "function")
        self._refuse("criteria", self.criteria, self.strong_model, "strong_model")
        self._refuse("rule", self.rule != RuleConfig(), self.rule.kind, "rule.kind")
        self._refuse(
            "judge", self.judge != JudgeConfig(), self.judge.is_given, "judge.url or policy"
        )
        is_changed = self.ranking != "round_robin"
        self._refuse("ranking", is_changed, self.compares, "pairwise_model or a judge's compare")

    def _refuse(self, setting: str, is_set: object, is_used: object, used_with: str) -> None:
        if is_set and not is_used:
            raise UserError(
                f"reward.{setting} goes with {used_with}, got {', '.join(self.sources())}; leave "
                f"it out or change the source"
            )

    def model_names(self, prefix: str = "reward") -> dict[str, str]:
        """Which setting names which model that this source reads, a directory or a hub name."""
        settings = ("model", "pairwise_model", "segment_model", "strong_model", "weak_model")
        return {f"{prefix}.{s}": name for s in settings if (name := getattr(self, s))}


_SOURCES = (
    "function, rule.kind, model, pairwise_model, judge.url, strong_model, pairs, "
    "scores, labeller, models, parts"
)


@dataclass(frozen=True)
class PartConfig(SourceConfig):
    """One part of a composed reward."""

    name: str = ""
    """Shown in files and reports."""
    weight: float = 1.0
    """Factor in the sum."""
    is_constraint: bool = False
    """Not added: responses below `threshold` get reward.violation_reward."""
    threshold: float = 0.0
    """See is_constraint."""
    margin: float = 0.0
    """Of a ranked combination: differences up to this one decide nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or len(self.sources()) != 1:
            raise UserError(
                f"reward.parts: each part needs a name and one source, got name {self.name!r} and "
                f"{', '.join(self.sources()) or 'none'}"
            )
        if self.margin < 0:
            raise UserError(f"reward.parts: margin must be >= 0, got {self.margin} of {self.name}")


@dataclass(frozen=True)
class EnsembleConfig:
    """How the opinions of several reward models become one reward."""

    reduction: Reduction = "mean"
    """mean; min (WCO); uwo: mean - c * variance; lcb: mean - c * deviation; robust: (1 - c) * mean
    + c * min."""
    coefficient: float = 1.0
    """The c of the reductions."""
    members: int = 1
    """Reward models trained in this run (with `pairs` or `labeller`), each on its own bootstrap
    sample of the prompts where there are several."""

    def __post_init__(self) -> None:
        if self.members < 1 or self.coefficient < 0:
            raise UserError(
                f"reward.ensemble: members must be >= 1 and coefficient >= 0, got {self.members} "
                f"and {self.coefficient}"
            )


@dataclass(frozen=True)
class CompositionConfig:
    """How `reward.parts` become one reward."""

    combination: Combination = "weighted"
    """weighted: sum of weight * part. gated: weights from `gate`. hierarchical: the parts after the
    first count only where the first reaches `threshold`. ranked: of two responses the first part
    decides that differs by more than its `margin`; the reward is the share of those beaten."""
    gate: str | None = None
    """module:function called as f(prompt) -> one weight per part that is no constraint."""
    threshold: float = 0.0
    """Of the hierarchical combination."""
    violation_reward: float = 0.0
    """Reward of a response that violates a constraint."""

    def __post_init__(self) -> None:
        if (self.combination == "gated") != (self.gate is not None):
            raise UserError("reward.composition: `gate` and combination `gated` go together")
