"""kill -9 in a stage that runs by itself: its output is absent or whole, and it can run again."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.online.config import GenerationConfig, RewardConfig
from rlhf_fast.online.merging import MergeConfig
from rlhf_fast.online.stages import SFT, Evaluate, Generate, Merge, Reward, Score, Select, Train
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from tests.online.helpers import demonstration_rows, pair_rows, prompt_rows, write_rows
from tests.online.killed_process import kill_stage, stage_to_the_end

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, batch_size=4)
COMMON = {"device": "cpu", "precision": "fp32"}
GENERATION = GenerationConfig(
    "hf", num_generations=2, sampling=SamplingConfig(max_new_tokens=4), dtype="float32"
)


@pytest.fixture
def stages(tmp_path, model_path, monkeypatch):
    """Each stage with the files that it reads, which the stages before it have written."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "online"))
    prompts = write_rows(tmp_path / "prompts.jsonl", prompt_rows())
    demonstrations = write_rows(tmp_path / "sft.jsonl", demonstration_rows())
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    names = ("sft", "reward", "c.jsonl", "s.jsonl", "p.jsonl", "policy", "m.json", "soup")
    sft, reward, completions, scored, selected, policy, metrics, soup = (
        str(tmp_path / name) for name in names
    )
    rule = RewardConfig(function="helpers:varied")
    dpo = DPOConfig(optimizer=OPTIMIZER)
    return {
        "sft": SFT(sft, model=model_path, data=demonstrations, **COMMON),
        "reward": Reward(reward, model=sft, pairs=pairs, **COMMON),
        "generate": Generate(
            completions, model=sft, prompts=prompts, generation=GENERATION, **COMMON
        ),
        "score": Score(scored, completions=completions, reward=rule, **COMMON),
        "select": Select(selected, scored=scored, **COMMON),
        "train": Train(policy, model=sft, selected=selected, dpo=dpo, **COMMON),
        "evaluate": Evaluate(metrics, scored=scored, **COMMON),
        "merge": Merge((model_path, sft), output=soup, merge=MergeConfig()),
    }


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def test_killed_stages_leave_nothing_half_done(stages):
    for name, stage in stages.items():
        whole = replace(stage, output=f"{stage.output}.whole")
        accesses = stage_to_the_end(whole)
        for moment in sorted({1, (accesses + 1) // 2, accesses}):
            output = Path(stage.output)
            if not output.exists():
                kill_stage(stage, moment)
        if not output.exists():
            stage_to_the_end(stage)
        expected = {
            key.replace(".whole", ""): value for key, value in contents(Path(whole.output)).items()
        }
        assert contents(output) == expected, name
