"""What a policy loss can be told: its names, its settings, and how both reach the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from rlhf_fast.ops import native
from rlhf_fast.ops.aggregation import AGGREGATIONS

RATIO_LEVELS = ("token", "sequence-mean", "sequence-sum")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_CORRECTIONS = ("none", "straight-through", "weighted-straight-through", "importance")
SAMPLING_CORRECTIONS = ("truncate", "mask")
SAMPLING_LEVELS = ("token", "sequence", "sequence-gate")

# name -> (the kernel's loss, the aggregation that its authors use)
LOSS_TYPES = {
    "reinforce": ("reinforce", "token-mean"),
    "remax": ("reinforce", "seq-mean-token-sum"),
    "rloo": ("rloo", "seq-mean-token-mean"),
    "reinforce++": ("ppo", "token-mean"),
    "ppo": ("ppo", "token-mean"),
    "grpo": ("ppo", "seq-mean-token-mean"),
    "bnpo": ("ppo", "token-mean"),
    "dapo": ("ppo", "token-mean"),
    "dr_grpo": ("ppo", "seq-mean-token-sum-norm"),
    "cispo": ("cispo", "token-mean"),
    "gspo": ("gspo", "seq-mean-token-mean"),
    "gspo_token": ("gspo_token", "seq-mean-token-mean"),
    "luspo": ("gspo", "seq-mean-token-sum"),
    "gmpo": ("gmpo", "seq-mean-token-mean"),
    "dppo_tv": ("dppo_tv", "token-mean"),
    "dppo_kl": ("dppo_kl", "token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "vespo": ("vespo", "token-mean"),
    "a_lol": ("a_lol", "seq-mean-token-sum"),
    "dro": ("dro", "token-mean"),
}


@dataclass(frozen=True)
class PolicyLossParams:
    """Settings of `policy_loss`; each loss reads those that concern it."""

    epsilon_low: float = 0.2
    """The ratio is cut off below 1 - epsilon_low; 1 switches that off. gmpo bounds log-ratios,
    dppo_tv and dppo_kl divergences (their authors: 0.15 and 0.05)."""
    epsilon_high: float = 0.2
    """And above 1 + epsilon_high. DAPO: 0.28. CISPO in TRL: its `epsilon_high` minus 1."""
    dual_clip: float | None = None
    """Cuts the ratio off where the advantage is negative; above 1 + epsilon_high. TRL: `delta`.
    dppo_tv and dppo_kl: the largest ratio that a token is weighed with, whatever its advantage."""
    ratio_level: str | None = None
    """token, sequence-mean or sequence-sum (of log-ratios); None: the loss's own."""
    log_ratio_bound: float = 20.0
    """Log-ratios beyond it count as it and pass no gradient (verl, OpenRLHF); TRL: infinity."""
    aggregation: str | None = None
    """How token losses become one number, see `policy_loss`; None: the loss's own."""
    max_length: int | None = None
    """Divides seq-mean-token-sum-norm; None: the width of the batch."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy."""
    kl_estimator: str = "k3"
    """k1, k2 or k3, joschu.net/blog/kl-approx.html."""
    kl_correction: str = "none"
    """What is differentiated. none: the estimator (TRL); straight-through: k2 (verl's `k3+`);
    weighted-straight-through: k2 times the ratio up to 10 (OpenRLHF's unbiased gradient);
    importance: the estimator times the ratio, which also scales its value (DeepSeek-V3.2, TRL)."""
    kl_bound: float | None = None
    """Bounds the estimate's size; verl and OpenRLHF: 10."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, aggregated like the loss."""
    sampling_correction: str = "truncate"
    """For ratios between trainer and sampler outside their bounds: truncate, or mask to 0."""
    sampling_level: str = "token"
    """token; sequence: the product of its tokens' ratios; sequence-gate: token ratios, masked where
    the sequence's geometric mean is outside (OpenRLHF)."""
    sampling_low: float = 0.0
    sampling_high: float = 2.0
    """The bounds."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    """Sharpness of SAPO's gate for positive and other advantages."""
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    """Shape and rate of VESPO's weight for advantages from 0 on, and below."""
    dro_beta: float = 1.0
    """Weight of DRO's squared log-ratio."""

    def __post_init__(self):
        for name, allowed in _ENUMERATIONS.items():
            value = getattr(self, name)
            optional = name in ("ratio_level", "aggregation") and value is None
            _check(optional or value in allowed, name, f"be one of {allowed}", value)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                _check(not math.isnan(value), field.name, "be a number", value)
        _check(0 <= self.epsilon_low <= 1, "epsilon_low", "lie in [0, 1]", self.epsilon_low)
        for name in ("epsilon_high", "kl_coef", "sampling_low"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, name, "be finite and not negative", value)
        dual, highest = self.dual_clip, 1 + self.epsilon_high
        _check(
            dual is None or dual > highest,
            "dual_clip",
            f"exceed 1 + epsilon_high = {highest}",
            dual,
        )
        low, high = self.sampling_low, self.sampling_high
        _check(high > low, "sampling_high", f"exceed sampling_low = {low}", high)
        for name in _POSITIVE:
            value = getattr(self, name)
            _check(value is None or value > 0, name, "be positive", value)

    def choices(self, loss_type: str, per_sequence: bool, in_segments: bool = False) -> list[int]:
        """In the order of the kernels' table."""
        loss = native.POLICY_LOSSES.index(LOSS_TYPES[loss_type][0])
        level = native.POLICY_RATIO_LEVELS[loss]
        if self.ratio_level is not None:
            level = RATIO_LEVELS.index(self.ratio_level)
        elif in_segments and level == RATIO_LEVELS.index("token"):
            level = RATIO_LEVELS.index("sequence-sum")  # the probability of a macro action
        values = {
            "loss": loss,
            "ratio_level": level,
            "kl_estimator": KL_ESTIMATORS.index(self.kl_estimator),
            "kl_correction": KL_CORRECTIONS.index(self.kl_correction),
            "sampling_correction": SAMPLING_CORRECTIONS.index(self.sampling_correction),
            "sampling_level": SAMPLING_LEVELS.index(self.sampling_level),
            "advantages_are_per_sequence": int(per_sequence),
        }
        return [values[name] for name in native.POLICY_CHOICES]

    def settings(self) -> list[float]:
        """In the order of the kernels' table."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {
            "dual_clip": math.inf if self.dual_clip is None else self.dual_clip,
            "kl_bound": math.inf if self.kl_bound is None else self.kl_bound,
            "log_ratio_bound": min(self.log_ratio_bound, 80.0),  # float32 ends at exp(88)
            "sampling_log_low": math.log(self.sampling_low) if self.sampling_low else -math.inf,
            "sampling_log_high": math.log(self.sampling_high),
        }
        return [float(values[name]) for name in native.POLICY_SETTINGS]


_ENUMERATIONS = {
    "ratio_level": RATIO_LEVELS,
    "aggregation": AGGREGATIONS,
    "kl_estimator": KL_ESTIMATORS,
    "kl_correction": KL_CORRECTIONS,
    "sampling_correction": SAMPLING_CORRECTIONS,
    "sampling_level": SAMPLING_LEVELS,
}
_POSITIVE = (
    "log_ratio_bound",
    "max_length",
    "kl_bound",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "dro_beta",
)


def _check(condition: bool, name: str, must: str, got: object) -> None:
    native.check(condition, "policy_loss", f"{name} must {must}", got, "see PolicyLossParams")
