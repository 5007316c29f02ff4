"""The paper's recipe: online iterative DPO of an 8B SFT model (arXiv 2405.07863)."""

from __future__ import annotations

from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.online.config import DataConfig, GenerationConfig, OnlineConfig, RewardConfig
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig


def rlhf_workflow() -> OnlineConfig:
    """Three iterations of 20K prompts x 8 responses; reward FsfairX; reference = the SFT model."""
    return OnlineConfig(
        model="RLHFlow/LLaMA3-SFT-v2",
        output_dir="runs/rlhf-workflow",
        num_iterations=3,
        data=DataConfig(
            prompts="RLHFlow/ultrafeedback_iter1:train",
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
