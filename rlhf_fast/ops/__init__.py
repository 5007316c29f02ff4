"""Fused ops. Each has a twin in plain PyTorch, `<op>_ref`, which says what it must compute."""

from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref

__all__ = ["LogpsOutput", "logps", "logps_ref"]
