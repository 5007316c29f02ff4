"""The small run that tests of the workflow and of the commands vary."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.online.config import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    OnlineConfig,
    RewardConfig,
)
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from tests.online.helpers import demonstration_rows, prompt_rows, write_rows


def small_run(model_path: str, tmp_path: Path) -> OnlineConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3, batch_size=4, schedule="constant")
    return OnlineConfig(
        model=model_path,
        output_dir=str(tmp_path / "run"),
        num_iterations=2,
        precision="fp32",
        device="cpu",
        data=DataConfig(
            prompts=write_rows(tmp_path / "prompts.jsonl", prompt_rows()),
            evaluation_share=0.25,
            demonstrations=write_rows(tmp_path / "sft.jsonl", demonstration_rows()),
        ),
        sft=optimizer,
        reward=RewardConfig(function="helpers:shorter_is_better"),
        generation=GenerationConfig(
            backend="hf",
            num_generations=3,
            sampling=SamplingConfig(max_new_tokens=8),
            dtype="float32",
        ),
        dpo=DPOConfig(optimizer=optimizer),
        evaluation=EvaluationConfig(num_generations=2),
    )
