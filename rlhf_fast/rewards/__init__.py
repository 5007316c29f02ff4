"""Scorers: each gives every completion of every group one finite number."""

from rlhf_fast.rewards.function import FunctionScorer
from rlhf_fast.rewards.model import RewardModelScorer

__all__ = ["FunctionScorer", "RewardModelScorer"]
