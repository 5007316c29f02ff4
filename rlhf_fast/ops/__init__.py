"""Fused ops. Each has a twin in plain PyTorch, `<op>_ref`, which says what it must compute."""

from rlhf_fast.ops.gae import GaeOutput, gae, gae_ref, macro_gae
from rlhf_fast.ops.group_advantages import group_advantages, group_advantages_ref
from rlhf_fast.ops.head_inputs import HeadSettings, head_weight
from rlhf_fast.ops.kl import kl, kl_ref, kl_top_k, kl_with_grad_
from rlhf_fast.ops.linear_logps import linear_logps, linear_logps_ref
from rlhf_fast.ops.linear_policy_loss import (
    LinearPolicyOutput,
    linear_policy_loss,
    linear_policy_loss_ref,
)
from rlhf_fast.ops.linear_preference_loss import (
    LinearPreferenceOutput,
    linear_preference_loss,
    linear_preference_loss_ref,
)
from rlhf_fast.ops.list_loss import LIST_LOSSES, list_loss, list_loss_ref
from rlhf_fast.ops.logps import logps, logps_with_grad_
from rlhf_fast.ops.logps_ref import LogpsOutput, logps_ref
from rlhf_fast.ops.policy_loss import (
    PolicyLossCoefficients,
    PolicyLossOutput,
    PolicyMetrics,
    policy_loss,
    policy_loss_coefficients,
)
from rlhf_fast.ops.policy_loss_ref import policy_loss_ref
from rlhf_fast.ops.policy_params import PolicyLossParams
from rlhf_fast.ops.preference_inputs import (
    PREFERENCE_LOSSES,
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
)
from rlhf_fast.ops.preference_loss import (
    preference_loss,
    unpaired_preference_loss,
)
from rlhf_fast.ops.preference_ref import preference_loss_ref, unpaired_preference_loss_ref
from rlhf_fast.ops.reward_model_loss import (
    REWARD_LOSSES,
    reward_model_loss,
    reward_model_loss_ref,
    reward_regression_loss,
    reward_regression_loss_ref,
)
from rlhf_fast.ops.segment_sum import segment_sum, segment_sum_ref
from rlhf_fast.ops.token_preference_loss import token_preference_loss
from rlhf_fast.ops.value_loss import ValueLossOutput, ValueMetrics, value_loss, value_loss_ref
from rlhf_fast.ops.whiten import whiten, whiten_ref, whiten_statistics

__all__ = [
    "LIST_LOSSES",
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "GaeOutput",
    "HeadSettings",
    "LinearPolicyOutput",
    "LinearPreferenceOutput",
    "LogpsOutput",
    "PairData",
    "PolicyLossCoefficients",
    "PolicyLossOutput",
    "PolicyLossParams",
    "PolicyMetrics",
    "PreferenceLossOutput",
    "PreferenceParams",
    "ValueLossOutput",
    "ValueMetrics",
    "gae",
    "gae_ref",
    "group_advantages",
    "group_advantages_ref",
    "head_weight",
    "kl",
    "kl_ref",
    "kl_top_k",
    "kl_with_grad_",
    "linear_logps",
    "linear_logps_ref",
    "linear_policy_loss",
    "linear_policy_loss_ref",
    "linear_preference_loss",
    "linear_preference_loss_ref",
    "list_loss",
    "list_loss_ref",
    "logps",
    "logps_ref",
    "logps_with_grad_",
    "macro_gae",
    "policy_loss",
    "policy_loss_coefficients",
    "policy_loss_ref",
    "preference_loss",
    "preference_loss_ref",
    "reward_model_loss",
    "reward_model_loss_ref",
    "reward_regression_loss",
    "reward_regression_loss_ref",
    "segment_sum",
    "segment_sum_ref",
    "token_preference_loss",
    "unpaired_preference_loss",
    "unpaired_preference_loss_ref",
    "value_loss",
    "value_loss_ref",
    "whiten",
    "whiten_ref",
    "whiten_statistics",
]
