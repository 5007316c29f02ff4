"""Fused ops. Each has a twin in plain PyTorch, `<op>_ref`, which says what it must compute."""

from rlhf_fast.ops.kl import kl, kl_ref, kl_top_k
from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref, logps_with_grad_

__all__ = ["LogpsOutput", "kl", "kl_ref", "kl_top_k", "logps", "logps_ref", "logps_with_grad_"]
