"""The paper's recipe: online iterative DPO of an 8B SFT model (arXiv 2405.07863).

Where the paper and its scripts disagree, docs/paper_index.md says what was chosen.
"""

from __future__ import annotations

from typing import Any

from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.online.config import DataConfig, GenerationConfig, OnlineConfig, RewardConfig
from rlhf_fast.rows import read_rows
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig

PROMPT_SETS = tuple(f"RLHFlow/ultrafeedback_iter{number}" for number in (1, 2, 3))
"""20K conversations each, as `context_messages`: those of the three iterations."""


def prompts() -> list[dict[str, Any]]:
    """All prompts of the three iterations; each draws its 20K of them, no prompt twice."""
    return [
        {"id": f"{name}/{number}", "messages": row["context_messages"]}
        for name in PROMPT_SETS
        for number, (_, row) in enumerate(read_rows(name))
    ]


def rlhf_workflow() -> OnlineConfig:
    """Three iterations of 20K prompts x 8 responses; reward FsfairX; reference = the SFT model."""
    return OnlineConfig(
        model="RLHFlow/LLaMA3-SFT-v2",
        output_dir="runs/rlhf-workflow",
        num_iterations=3,
        data=DataConfig(
            prompts=f"{__name__}:prompts",
            prompts_per_iteration=20_000,
        ),
        reward=RewardConfig(model="sfairXC/FsfairX-LLaMA3-RM-v0.1"),
        generation=GenerationConfig(
            num_generations=8, sampling=SamplingConfig(temperature=1.0, max_new_tokens=2048)
        ),
        dpo=DPOConfig(
            beta=0.1,
            optimizer=OptimizerConfig(
                learning_rate=5e-7, num_epochs=2, batch_size=128, schedule="cosine"
            ),
        ),
    )
