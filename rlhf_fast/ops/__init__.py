"""Fused ops. Each has a twin in plain PyTorch, `<op>_ref`, which says what it must compute."""

from rlhf_fast.ops.gae import GaeOutput, gae, gae_ref, macro_gae
from rlhf_fast.ops.group_advantages import group_advantages, group_advantages_ref
from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref
from rlhf_fast.ops.policy_loss import (
    PolicyLossCoefficients,
    PolicyLossOutput,
    PolicyMetrics,
    policy_loss,
    policy_loss_coefficients,
)
from rlhf_fast.ops.policy_loss_ref import policy_loss_ref
from rlhf_fast.ops.policy_params import PolicyLossParams
from rlhf_fast.ops.value_loss import ValueLossOutput, ValueMetrics, value_loss, value_loss_ref
from rlhf_fast.ops.whiten import whiten, whiten_ref, whiten_statistics

__all__ = [
    "GaeOutput",
    "LogpsOutput",
    "PolicyLossCoefficients",
    "PolicyLossOutput",
    "PolicyLossParams",
    "PolicyMetrics",
    "ValueLossOutput",
    "ValueMetrics",
    "gae",
    "gae_ref",
    "group_advantages",
    "group_advantages_ref",
    "logps",
    "logps_ref",
    "macro_gae",
    "policy_loss",
    "policy_loss_coefficients",
    "policy_loss_ref",
    "value_loss",
    "value_loss_ref",
    "whiten",
    "whiten_ref",
    "whiten_statistics",
]
