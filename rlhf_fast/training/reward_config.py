"""Settings of the training of reward models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import LoraConfig
from rlhf_fast.training.gating import GateConfig
from rlhf_fast.training.optimizer import OptimizerConfig

Objective = Literal[
    "pairs", "segments", "pairwise", "attributes", "quantiles", "rankings", "binary"
]


@dataclass(frozen=True)
class RewardTrainingConfig:
    """Training of a reward model."""

    objective: Objective = "pairs"
    """pairs: Bradley-Terry. segments: the same of the mean reward of a response's segments (arXiv
    2501.02790). pairwise: a language model that answers which of two is better, A or B.
    From scored responses: attributes, one output per score; quantiles, several of one score;
    rankings, Plackett-Luce of all responses to a prompt (arXiv 2301.11270); binary, the log-odds of
    a score between 0 and 1, as whether users liked a response (arXiv 2505.14946)."""
    num_outputs: int = 1
    """With pairs, members of an ensemble on one decoder (arXiv 2401.16635); with quantiles, their
    number."""
    members: Literal["heads", "adapters"] = "heads"
    """What the members of an ensemble have of their own: a head, or adapters with a head, each
    trained after the other on a decoder that stays as it is (arXiv 2401.00243)."""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """The adapters of such members."""
    parameters: Literal["head", "all"] = "all"
    """`all` fine-tunes the whole model; `head` fits a linear head on frozen features."""
    head_weight_decay: float = 0.1
    """L2 penalty on the head (of features scaled to unit variance) when only it is trained."""
    holdout_share: float = 0.1
    """Share of the prompts kept to measure how often responses are ordered right."""
    center_coefficient: float = 0.0
    """Weight of the mean of (r_chosen + r_rejected)^2, which holds rewards around zero
    (arXiv 2312.09244)."""
    label_smoothing: float = 0.0
    """Assumed share of flipped pairs (conservative Bradley-Terry, arXiv 2401.06080)."""
    label_update_rate: float = 0.0
    """Each time a pair is seen its label moves by this rate to what the model then believes
    (iterative data smoothing, arXiv 2401.16335)."""
    contrastive_weight: float = 0.0
    """With pairs, weight of a SimCSE term: two dropouts of a response's features resemble each
    other more than those of the micro-batch's other responses (arXiv 2401.06080, equation 9)."""
    segments: Literal["entropy", "sentences"] = "entropy"
    """With objective segments, where they end: before tokens that the model to start from predicts
    with an entropy above `entropy_threshold`, or with sentences."""
    entropy_threshold: float = 2.0
    """See segments; in nats."""
    gate: GateConfig = field(default_factory=GateConfig)
    """With attributes, training of the gate that weighs them by the prompt (arXiv 2406.12845),
    where preference pairs are given beside the scores."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-6, batch_size=512, weight_decay=1e-3
        )
    )
    """Optimiser when the whole model is trained."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_share < 1:
            raise UserError(f"reward holdout_share must be in [0, 1), got {self.holdout_share}")
        for name in ("center_coefficient", "contrastive_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.num_outputs < 1:
            raise UserError(f"num_outputs must be >= 1, got {self.num_outputs}")
        if not 0 <= self.label_smoothing < 0.5 or not 0 <= self.label_update_rate < 1:
            raise UserError(
                f"label_smoothing must be in [0, 0.5) and label_update_rate in [0, 1), "
                f"got {self.label_smoothing} and {self.label_update_rate}"
            )
        if self.members == "adapters" and (self.objective != "pairs" or self.parameters != "all"):
            raise UserError(
                f"members adapters are trained with objective pairs and parameters all, "
                f"got {self.objective} and {self.parameters}"
            )
        self._check_used()
        whole = self.objective != "pairs" or self.num_outputs > 1 or self.center_coefficient
        if self.parameters == "head" and (
            whole or self.label_update_rate or self.contrastive_weight
        ):
            raise UserError(
                "parameters head fits one output to pairs, without centering, contrastive term or "
                "label updates; use parameters all"
            )

    def _check_used(self) -> None:
        """Refuses what the objective would leave aside in silence."""
        names: tuple[str, ...] = ()
        if self.objective not in ("pairs", "segments"):
            names = ("center_coefficient", "label_smoothing", "label_update_rate")
        if self.objective != "pairs":
            names += ("contrastive_weight",)
        given = [name for name in names if getattr(self, name)]
        if self.num_outputs > 1 and self.objective not in ("pairs", "segments", "quantiles"):
            given.append("num_outputs")
        if given:
            raise UserError(
                f"objective {self.objective} has no use for {given[0]}, "
                f"got {getattr(self, given[0])}; leave it at its default"
            )

    @property
    def head_outputs(self) -> int:
        """Outputs of one head."""
        return 1 if self.members == "adapters" else self.num_outputs
