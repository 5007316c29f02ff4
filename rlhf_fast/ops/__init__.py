"""Fused ops. Each has a PyTorch twin with the same meaning, `<op>_ref`, which is its specification."""

from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref

__all__ = ["LogpsOutput", "logps", "logps_ref"]
