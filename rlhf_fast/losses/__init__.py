"""Losses as pure functions of log-probabilities."""

from rlhf_fast.losses.lists import lipo_loss, pro_loss, rrhf_loss
from rlhf_fast.losses.policy import (
    clip_cov_advantages,
    keep_high_entropy,
    kl_cov_penalty,
    mask_off_policy_sequences,
    n_step_returns,
    oreal_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    token_covariances,
    token_rewards,
)
from rlhf_fast.losses.preference import (
    PreferenceLoss,
    SelfRevisionLogRatios,
    cpl_loss,
    dpo_loss,
    inpo_loss,
    kto_loss,
    nash_md_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
    srpo_loss,
    xpo_loss,
)
from rlhf_fast.losses.reward_model import contrastive_loss, k_wise_loss, smooth_labels
from rlhf_fast.losses.token_preference import (
    contrastive_token_rewards,
    treg_loss,
    wpo_weights,
)

__all__ = [
    "PreferenceLoss",
    "SelfRevisionLogRatios",
    "clip_cov_advantages",
    "contrastive_loss",
    "contrastive_token_rewards",
    "cpl_loss",
    "dpo_loss",
    "inpo_loss",
    "k_wise_loss",
    "keep_high_entropy",
    "kl_cov_penalty",
    "kto_loss",
    "lipo_loss",
    "mask_off_policy_sequences",
    "n_step_returns",
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
    "token_covariances",
    "token_rewards",
    "treg_loss",
    "wpo_weights",
    "xpo_loss",
]
