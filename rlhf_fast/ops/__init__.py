"""Fused ops. Each has a twin in plain PyTorch, `<op>_ref`, which says what it must compute."""

from rlhf_fast.ops.head_inputs import head_weight
from rlhf_fast.ops.linear_logps import linear_logps, linear_logps_ref
from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref

__all__ = [
    "LogpsOutput",
    "head_weight",
    "linear_logps",
    "linear_logps_ref",
    "logps",
    "logps_ref",
]
