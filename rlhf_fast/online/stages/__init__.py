"""Every stage by itself: files in, files out, by the functions that the loop calls too."""

from rlhf_fast.online.stages.evaluate import Evaluate
from rlhf_fast.online.stages.models import SFT, Merge, Reward, Train
from rlhf_fast.online.stages.responses import Generate, Score, Select

STAGES: dict[str, type] = {
    "sft": SFT,
    "reward": Reward,
    "generate": Generate,
    "score": Score,
    "select": Select,
    "train": Train,
    "evaluate": Evaluate,
    "merge": Merge,
}

__all__ = ["SFT", "STAGES", "Evaluate", "Generate", "Merge", "Reward", "Score", "Select", "Train"]
