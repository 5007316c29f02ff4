"""Scorers: each gives every completion of every group one finite number."""

from rlhf_fast.rewards.build import Compute, make_source
from rlhf_fast.rewards.compose import ComposedScorer, Part
from rlhf_fast.rewards.density_ratio import DensityRatioScorer
from rlhf_fast.rewards.ensemble import EnsembleScorer
from rlhf_fast.rewards.function import FunctionScorer
from rlhf_fast.rewards.judge import JudgeConfig, LLMJudge
from rlhf_fast.rewards.model import HeadsScorer, RewardModelScorer
from rlhf_fast.rewards.pair_model import PairModel
from rlhf_fast.rewards.pairwise import PairwiseScorer
from rlhf_fast.rewards.rules import RuleConfig, RuleScorer
from rlhf_fast.rewards.scorer import Scorer, score_together
from rlhf_fast.rewards.shaping import ShapedScorer, ShapingConfig

__all__ = [
    "ComposedScorer",
    "Compute",
    "DensityRatioScorer",
    "EnsembleScorer",
    "FunctionScorer",
    "HeadsScorer",
    "JudgeConfig",
    "LLMJudge",
    "PairModel",
    "PairwiseScorer",
    "Part",
    "RewardModelScorer",
    "RuleConfig",
    "RuleScorer",
    "Scorer",
    "ShapedScorer",
    "ShapingConfig",
    "make_source",
    "score_together",
]
