"""Losses as pure functions of log-probabilities."""

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

__all__ = [
    "PreferenceLoss",
    "SelfRevisionLogRatios",
    "dpo_loss",
    "inpo_loss",
    "kto_loss",
    "nash_md_loss",
    "orpo_loss",
    "simpo_loss",
    "slic_loss",
    "srpo_loss",
    "wpo_weights",
    "xpo_loss",
]
