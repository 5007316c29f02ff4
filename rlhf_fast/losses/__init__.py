"""Losses as pure functions of log-probabilities."""

from rlhf_fast.losses.lists import lipo_loss, pro_loss, rrhf_loss
from rlhf_fast.losses.policy import (
    keep_high_entropy,
    oreal_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    token_rewards,
)
from rlhf_fast.losses.preference import (
    PreferenceLoss,
    SelfRevisionLogRatios,
    dpo_loss,
    inpo_loss,
    kto_loss,
    nash_md_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
    srpo_loss,
    wpo_weights,
    xpo_loss,
)
from rlhf_fast.losses.reward_model import contrastive_loss, k_wise_loss, smooth_labels

__all__ = [
    "PreferenceLoss",
    "SelfRevisionLogRatios",
    "contrastive_loss",
    "dpo_loss",
    "inpo_loss",
    "k_wise_loss",
    "keep_high_entropy",
    "kto_loss",
    "lipo_loss",
    "nash_md_loss",
    "oreal_advantages",
    "orpo_loss",
    "pro_loss",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "rrhf_loss",
    "simpo_loss",
    "slic_loss",
    "smooth_labels",
    "srpo_loss",
    "token_rewards",
    "wpo_weights",
    "xpo_loss",
]
