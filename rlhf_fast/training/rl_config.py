"""What can be said about a policy-gradient update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.ops.policy_params import LOSS_TYPES
from rlhf_fast.training.critic import CriticConfig
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.token_credit import OutcomeConfig

LossType = Literal[tuple(LOSS_TYPES)]  # type: ignore
DIVIDED = "seq-mean-token-sum-norm"
"""Aggregation of losses whose responses count by one length, not each by its own."""
GroupEstimator = Literal["grpo", "dr_grpo", "rloo", "maxrl", "opo", "pass_at_k", "best", "rank"]
Estimator = (
    GroupEstimator
    | Literal[
        "reinforce++", "reinforce++_baseline", "remax", "gae", "constant", "imitation", "oreal"
    ]
)


@dataclass(frozen=True)
class CovarianceConfig:
    """Tokens whose advantage and log-probability vary together most: learning from them is what
    lowers the entropy (arXiv 2505.22617). Log-probabilities are those before the update."""

    rule: Literal["none", "clip", "kl"] = "none"
    """clip: some of them pass no gradient (Clip-Cov). kl: they are held near the policy before the
    update (KL-Cov)."""
    share: float = 2e-4
    """Share of the update's tokens, one at least."""
    low: float = 1.0
    """Of clip: tokens are drawn from those whose covariance lies above this,"""
    high: float = 5.0
    """and below this."""
    kl_coef: float = 1.0
    """Of kl: weight of |log-ratio|."""

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.low < self.high and self.kl_coef >= 0):
            raise UserError(
                f"rl.covariance: share must lie in (0, 1], low below high, and kl_coef be >= 0, "
                f"got {self.share}, {self.low}, {self.high} and {self.kl_coef}"
            )


@dataclass(frozen=True)
class RLConfig:
    """Policy-gradient updates: which loss, which advantage, which ties."""

    loss_type: LossType = "grpo"
    """The loss; formulas and sources: `ops.policy_loss`."""
    advantage: Estimator = "grpo"
    """Of groups: `ops.group_advantages`. reinforce++: whitened returns (arXiv 2501.03262);
    reinforce++_baseline: reward minus the group's mean, whitened. remax: minus the reward of the
    greedy response (arXiv 2310.10505). gae: with a critic (arXiv 1506.02438). constant: minus
    `reward_baseline`, as 1/2 for winning probabilities (Nash-MD, arXiv 2312.00886). imitation: 1,
    so that `reinforce` is the likelihood of what was selected (with kl_coef: SuperHF, arXiv
    2310.16763). oreal: right responses are cloned, wrong ones get leave-one-out, tokens weighed by
    a model of which of them decided the outcome (arXiv 2502.06781)."""
    epsilon_low: float = 0.2
    """The probability ratio is cut off below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """And above 1 + epsilon_high."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated."""
    reward_kl_coef: float = 0.0
    """Weight of the KL to the reference in the reward of every token; with an advantage of groups,
    of the whole response."""
    max_length: int | None = None
    """Of dr_grpo: what each response's sum is divided by, the most tokens that one may have (arXiv
    2503.20783). None: those of the longest in the batch, so batches weigh unlike."""
    sampling_correction: Literal["none", "truncate", "mask"] = "truncate"
    """Weighs tokens by trainer / sampler probability, within `sampling_high`: the engine that
    sampled rounds differently, and with `overlap` it is one update older. The sampler's
    probabilities are those at temperature 1."""
    sampling_high: float = 2.0
    """Bound of that weight."""
    off_policy_threshold: float | None = None
    """Responses of negative advantage are left out while the mean of log(sampler / policy) over
    their tokens exceeds this (off-policy sequence masking, arXiv 2512.02556)."""
    covariance: CovarianceConfig = field(default_factory=CovarianceConfig)
    """What is done about tokens that lower the entropy."""
    reward_baseline: float = 0.0
    """Of advantage constant."""
    draws: int = 2
    """Of advantage pass_at_k: its k, at most the responses to a prompt; a response is right if its
    reward is above 0 (arXiv 2508.10751)."""
    gamma: float = 1.0
    """Discount per token, for reinforce++ and gae."""
    lam: float = 0.95
    """Trace decay of gae."""
    num_steps: int | None = None
    """gae takes the returns of this many tokens, and the critic from there, instead of `lam`
    (arXiv 1602.01783)."""
    macro_tokens: int = 1
    """Above 1, gae decides, values and credits runs of this many tokens as one (MA-RLHF, arXiv
    2410.02743)."""
    whiten: bool = True
    """Whitens the advantages of gae over all tokens of the update."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value model of gae."""
    outcome: OutcomeConfig = field(default_factory=OutcomeConfig)
    """Of oreal."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6, batch_size=64)
    )
    """Optimiser; its batches count prompts, its epochs pass over the same samples."""

    def __post_init__(self) -> None:
        for name in ("kl_coef", "reward_kl_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"rl.{name} must be >= 0, got {getattr(self, name)}")
        if self.reward_kl_coef and self.advantage in ("imitation", "oreal", "pass_at_k"):
            raise UserError(f"rl: advantage {self.advantage} takes kl_coef, not reward_kl_coef")
        if self.max_length is not None and LOSS_TYPES[self.loss_type][1] != DIVIDED:
            raise UserError(f"rl.max_length is of loss_type dr_grpo, got {self.loss_type}")
        for name in ("macro_tokens", "draws", "num_steps", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"rl.{name} must be >= 1, got {value}")
        if self.num_steps and self.macro_tokens > 1:
            raise UserError("rl.num_steps counts tokens: leave macro_tokens at 1")
        if (self.num_steps or self.macro_tokens > 1) and self.advantage != "gae":
            raise UserError(
                f"rl: num_steps and macro_tokens are of advantage gae, got {self.advantage}"
            )
        if (threshold := self.off_policy_threshold) is not None and not threshold >= 0:
            raise UserError(f"rl.off_policy_threshold must be >= 0, got {threshold}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"rl.{name} must be in [0, 1], got {getattr(self, name)}")
        try:
            self.params()
        except ValueError as error:
            raise UserError(f"rl: {error}") from error

    @property
    def is_one_pass(self) -> bool:
        """Whether every token's loss is known before the policy's log-probabilities."""
        return self.off_policy_threshold is None and self.covariance.rule != "kl"

    @property
    def least_responses(self) -> int:
        """The fewest responses to a prompt that the advantage is made of."""
        if self.advantage == "pass_at_k":
            return max(2, self.draws)
        return 2 if self.advantage in (*get_args(GroupEstimator), "reinforce++_baseline") else 1

    def params(self) -> ops.PolicyLossParams:
        corrects = self.sampling_correction != "none"
        return ops.PolicyLossParams(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            sampling_correction=self.sampling_correction if corrects else "truncate",
            sampling_high=self.sampling_high,
        )
