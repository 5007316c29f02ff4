"""A run that dies in any stage, before or after computing, ends as if nothing had happened."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_atomic
from rlhf_fast.online.config import EvaluationConfig, RewardConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.workflow import resume, run_online
from rlhf_fast.recipes import METHODS
from rlhf_fast.training.fit import OptimizerConfig
from tests.online.helpers import kill_and_resume, rows_without_times


class Recorder(Progress):
    """Keeps the names of the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def announce(self, stage: str, seconds: float | None) -> None:
        if seconds is not None:
            self.stages.append(stage)


def every_death_agrees(config, tmp_path: Path, stages: list[str] | None = None) -> None:
    recorder = Recorder()
    run_online(replace(config, output_dir=str(tmp_path / "whole")), recorder)
    expected = rows_without_times(tmp_path / "whole")
    for number, stage in enumerate(stages or recorder.stages):
        when = ("start", "end")[number % 2]
        killed = replace(config, output_dir=str(tmp_path / f"killed_{number}"))
        assert kill_and_resume(killed, stage, when) == expected, (stage, when)


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


@pytest.mark.slow
def test_every_stage(workflow, tmp_path):
    every_death_agrees(workflow, tmp_path)


def test_some_stages(workflow, tmp_path):
    stages = ["reward_model/model", "iteration_1/pairs", "iteration_1/kl", "iteration_2/policy"]
    every_death_agrees(workflow, tmp_path, stages)


@pytest.mark.parametrize("method", ["ppo", "warp", "apo", "contrastive-reward", "async"])
def test_stages_with_state_of_their_own(config, tmp_path, method):
    rl = replace(config.rl, optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4))
    config = replace(config, rl=rl, reward=RewardConfig(function="helpers:varied"))
    config = replace(config_with(config, METHODS[method][1], method), keep_checkpoints=1)
    stages = ["iteration_2/scored", "iteration_2/evaluation"]
    if method == "apo":
        stages = ["iteration_2/policy", "iteration_2/trained"]
    every_death_agrees(config, tmp_path, stages)


def test_a_changed_file_is_noticed(config, tmp_path):
    run_online(config)
    path = tmp_path / "run" / "iteration_2" / "scored.jsonl"
    path.write_text(path.read_text().replace('"finished": false', '"finished": true', 1))
    with open(tmp_path / "run" / "metrics.jsonl") as file:
        rows = file.readlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match="scored.jsonl is not what this run wrote"):
        resume(tmp_path / "run")


def test_a_damaged_checkpoint_is_named(config, tmp_path):
    run_online(config)
    run = tmp_path / "run"
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:-1]))
    file = run / "iteration_1" / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged checkpoint|cannot load"):
        resume(run)


def test_settings_that_were_changed_in_between_are_told(config, capsys):
    run_online(replace(config, num_iterations=1))
    path = Path(config.output_dir)
    capsys.readouterr()
    resume(path)
    assert "settings changed" not in capsys.readouterr().out
    text = (path / "config.yaml").read_text()
    text = text.replace("num_iterations: 1", "num_iterations: 2").replace("top_k: 0", "top_k: 9")
    (path / "config.yaml").write_text(text)
    resume(path)
    told = " ".join(capsys.readouterr().out.split())
    assert "settings changed since the run began, finished stages keep the old ones: " in told
    assert "num_iterations 1 -> 2, generation.sampling.top_k 0 -> 9" in told


def test_one_of_two_runs_that_start_at_once_gets_the_folder(config, monkeypatch):
    """As when a launcher starts the command once per GPU."""

    def slow(path, text):
        time.sleep(0.2)
        write_atomic(path, text)

    monkeypatch.setattr("rlhf_fast.online.run_folder.write_atomic", slow)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(RunFolder.create, config) for _ in range(2)]
        errors = [future.exception() for future in futures]
    (refused,) = [error for error in errors if error is not None]
    assert isinstance(refused, UserError) and "is not empty" in str(refused)
