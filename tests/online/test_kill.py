"""kill -9 at random moments, in one stage after another, ends as an uninterrupted run does."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import EvaluationConfig, RewardConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.workflow import resume, run_online
from rlhf_fast.recipes import METHODS
from rlhf_fast.training.fit import OptimizerConfig
from tests.online.helpers import rows_without_times
from tests.online.killed_process import run_and_kill, run_to_the_end


def checksum(run: Path) -> str:
    weights = run / "iteration_2" / "policy" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def survives_kills(config, tmp_path: Path, seed: int, stages: list[str] | None = None) -> None:
    counts = run_to_the_end(replace(config, output_dir=str(tmp_path / "whole")))
    moments = random.Random(seed)
    killed = replace(config, output_dir=str(tmp_path / f"killed_{seed}"))
    for stage in stages or [stage for stage in counts if stage]:
        run_and_kill(killed, stage, moments.randint(1, counts[stage]))
    run_to_the_end(killed)
    result = Path(killed.output_dir)
    assert rows_without_times(result) == rows_without_times(tmp_path / "whole")
    assert checksum(result) == checksum(tmp_path / "whole")


@pytest.fixture
def workflow(config):
    """SFT, labels, reward model, two iterations, evaluation by a judge; one checkpoint kept."""
    training = replace(config.reward.training, parameters="head")
    return replace(
        config,
        reward=RewardConfig(labeller="helpers:varied", training=training),
        evaluation=EvaluationConfig(judge="helpers:varied", num_generations=2),
        keep_checkpoints=1,
    )


def test_kills_in_some_stages(workflow, tmp_path):
    stages = ["sft/model", "reward_model/model", "iteration_1/policy", "iteration_2/completions"]
    survives_kills(workflow, tmp_path, 0, stages)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_in_every_stage(workflow, tmp_path, seed):
    survives_kills(workflow, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "warp", "apo", "contrastive-reward", "async", "inpo"])
def test_kills_with_state_of_their_own(config, tmp_path, method):
    rl = replace(config.rl, optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4))
    config = replace(config, rl=rl, reward=RewardConfig(function="helpers:varied"))
    survives_kills(config_with(config, METHODS[method][1], method), tmp_path, 4)


def test_a_run_killed_before_its_first_stage_goes_on(config):
    """While one of the two files that make a run folder is written."""
    run = Path(config.output_dir)
    left = [run / f"{name}.0123abcd.partial" for name in ("config.yaml", "manifest.json")]
    left[0].mkdir(parents=True)
    (left[0] / "config.yaml").write_text("model")
    RunFolder.create(config)
    left[1].mkdir()
    (run / "manifest.json").rename(left[1] / "manifest.json")
    folder, loaded = RunFolder.open(run)
    assert loaded == config and folder.manifest()["stages"] == []
    assert {file.name for file in run.iterdir()} == {"config.yaml", "manifest.json"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("{}", "must hold `version`"), ("[]", "must hold `version`")],
)
def test_a_damaged_manifest_is_named(config, text, message):
    run = RunFolder.create(config)
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json.* {message}.*; restore it"):
        resume(run.path)


def test_settings_of_another_version_are_named(config):
    run_online(replace(config, num_iterations=1))
    path = Path(config.output_dir) / "config.yaml"
    path.write_text(path.read_text().replace("num_generations: 3", "num_samples: 3"))
    with pytest.raises(UserError) as error:
        resume(Path(config.output_dir))
    message = str(error.value)
    assert "unknown key `generation.num_samples`" in message
    assert "the run was made by rlhf_fast" in message and "correct the line in" in message
