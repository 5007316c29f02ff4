"""Fused ops. Each has a twin in plain PyTorch, `<op>_ref`, which says what it must compute."""

from rlhf_fast.ops.head_inputs import HeadSettings, head_weight
from rlhf_fast.ops.kl import kl, kl_ref, kl_top_k
from rlhf_fast.ops.linear_logps import linear_logps, linear_logps_ref
from rlhf_fast.ops.linear_preference_loss import (
    LinearPreferenceOutput,
    linear_preference_loss,
    linear_preference_loss_ref,
)
from rlhf_fast.ops.list_loss import LIST_LOSSES, list_loss, list_loss_ref
from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref, logps_with_grad_
from rlhf_fast.ops.preference_inputs import (
    PREFERENCE_LOSSES,
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
)
from rlhf_fast.ops.preference_loss import (
    preference_loss,
    token_preference_loss,
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

__all__ = [
    "LIST_LOSSES",
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "HeadSettings",
    "LinearPreferenceOutput",
    "LogpsOutput",
    "PairData",
    "PreferenceLossOutput",
    "PreferenceParams",
    "head_weight",
    "kl",
    "kl_ref",
    "kl_top_k",
    "linear_logps",
    "linear_logps_ref",
    "linear_preference_loss",
    "linear_preference_loss_ref",
    "list_loss",
    "list_loss_ref",
    "logps",
    "logps_ref",
    "logps_with_grad_",
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
]
