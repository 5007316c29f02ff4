"""Fused ops. Each has a PyTorch twin of the same meaning, `<op>_ref`: its specification."""

from rlhf_fast.ops.logps import LogpsOutput, logps, logps_ref

__all__ = ["LogpsOutput", "logps", "logps_ref"]
