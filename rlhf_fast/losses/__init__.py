"""Losses as pure functions of log-probabilities."""

from rlhf_fast.losses.preference import PreferenceLoss, dpo_loss

__all__ = ["PreferenceLoss", "dpo_loss"]
