"""What can be said about a policy-gradient update."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from rlhf_fast import ops
from rlhf_fast.errors import UserError, refuse_unused
from rlhf_fast.ops.policy_params import KL_CORRECTIONS, LOSS_TYPES, SAMPLING_LEVELS
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
UNCLIPPED = ("reinforce", "dro", "sapo", "vespo")
DUAL_CLIPPED = ("ppo", "gspo", "gspo_token", "rloo")
CLIPPED_LOSSES = [name for name, (kernel, _) in LOSS_TYPES.items() if kernel not in UNCLIPPED]
OF_LOSSES = {
    "epsilon_low": CLIPPED_LOSSES,
    "epsilon_high": CLIPPED_LOSSES,
    "dual_clip": [name for name, (kernel, _) in LOSS_TYPES.items() if kernel in DUAL_CLIPPED],
    "max_length": [name for name, (_, how) in LOSS_TYPES.items() if how == DIVIDED],
}
OF_ADVANTAGES = {
    "reward_baseline": ("constant",),
    "draws": ("pass_at_k",),
    "gamma": ("gae", "reinforce++"),
    **dict.fromkeys(("lam", "num_steps", "macro_tokens", "whiten", "critic"), ("gae",)),
    "outcome": ("oreal",),
}
"""Settings of single losses and advantages."""


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
        refuse_unused(
            self,
            "rl.covariance",
            "rule",
            {"share": ("clip", "kl"), "low": ("clip",), "high": ("clip",), "kl_coef": ("kl",)},
        )
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
    temperature: float | None = None
    """Divides the logits of the policy that learns, as those that responses are drawn from. None:
    the run's `generation.sampling.temperature`; of `rlhf-fast train` 1."""
    epsilon_low: float = 0.2
    """The probability ratio is cut off below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """And above 1 + epsilon_high."""
    dual_clip: float | None = None
    """And, where the advantage is negative, at this (arXiv 1912.09729)."""
    max_length: int | None = None
    """Of dr_grpo: what a response's sum is divided by (arXiv 2503.20783). None: the run's
    `generation.sampling.max_new_tokens`; of `rlhf-fast train` the batch's longest response."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""
    high_entropy_share: float = 1.0
    """Below 1, only this share of the update's tokens has an advantage: those at which the policy
    before the update was least sure (arXiv 2506.01939, which takes 0.2). Means still count all."""
    mask_unfinished: bool = False
    """Responses that the token limit cut count in the advantages of the others, but are not learned
    from (overlong filtering, arXiv 2503.14476, section 3.4)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated."""
    kl_correction: Literal[KL_CORRECTIONS] = "none"  # type: ignore
    """What of the estimate is differentiated: `ops.PolicyLossParams`. importance, with k3: its
    unbiased gradient where the policy has moved (DeepSeek-V3.2, arXiv 2512.02556)."""
    reward_kl_coef: float = 0.0
    """Weight of the KL to the reference in the reward of every token; with an advantage of groups,
    of the whole response."""
    sampling_correction: Literal["none", "truncate", "mask"] = "truncate"
    """Weighs tokens by trainer / sampler probability, within `sampling_high`: the engine that
    sampled rounds differently, and with `overlap` it is one update older. Both probabilities are
    those at temperature 1, which samplers record."""
    sampling_level: Literal[SAMPLING_LEVELS] = "token"  # type: ignore
    """token; sequence: the product over the response; sequence-gate: tokens' own, masked where the
    response's geometric mean is outside of the bounds."""
    sampling_low: float = 0.0
    """Lower bound of that weight (with mask and 0.5, IcePop's)."""
    sampling_high: float = 2.0
    """Upper bound."""
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
        if self.temperature is not None and self.temperature <= 0:
            raise UserError(f"rl.temperature must be > 0, got {self.temperature}")
        for name in ("macro_tokens", "draws", "num_steps", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"rl.{name} must be >= 1, got {value}")
        if self.num_steps and self.macro_tokens > 1:
            raise UserError("rl.num_steps counts tokens: leave macro_tokens at 1")
        if (threshold := self.off_policy_threshold) is not None and not threshold >= 0:
            raise UserError(f"rl.off_policy_threshold must be >= 0, got {threshold}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"rl.{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.high_entropy_share <= 1:
            raise UserError(
                f"rl.high_entropy_share must lie in (0, 1], got {self.high_entropy_share}"
            )
        if self.high_entropy_share < 1 and self.covariance.rule != "none":
            raise UserError("rl: high_entropy_share and covariance both choose tokens; give one")
        self._check_used()
        try:
            self.params()
        except ValueError as error:
            raise UserError(f"rl: {error}") from error

    def _check_used(self) -> None:
        """Refuses settings that the chosen loss or advantage would ignore."""
        refuse_unused(self, "rl", "advantage", OF_ADVANTAGES)
        refuse_unused(self, "rl", "loss_type", OF_LOSSES)
        sampling = {f"sampling_{name}": ("truncate", "mask") for name in ("level", "low", "high")}
        refuse_unused(self, "rl", "sampling_correction", sampling)
        if self.kl_coef == 0:
            refuse_unused(self, "rl", "kl_coef", {"kl_estimator": (), "kl_correction": ()})

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

    def for_sampling(self, temperature: float, max_new_tokens: int) -> RLConfig:
        """With the temperature, and the length that sums are divided by, where none is given.

        Greedy responses are learned from as if they were drawn at temperature 1.
        """
        changes: dict[str, float] = {}
        if self.temperature is None:
            changes["temperature"] = temperature or 1.0
        if self.loss_type in OF_LOSSES["max_length"] and self.max_length is None:
            changes["max_length"] = max_new_tokens
        return replace(self, **changes)

    def params(self) -> ops.PolicyLossParams:
        corrects = self.sampling_correction != "none"
        return ops.PolicyLossParams(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_correction=self.kl_correction,
            dual_clip=self.dual_clip,
            entropy_coef=self.entropy_coef,
            max_length=self.max_length,
            sampling_correction=self.sampling_correction if corrects else "truncate",
            sampling_level=self.sampling_level,
            sampling_low=self.sampling_low,
            sampling_high=self.sampling_high,
        )
