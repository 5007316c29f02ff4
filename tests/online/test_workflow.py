"""The whole workflow on a tiny model: every source of rewards, resume, nothing lost."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import EvaluationConfig, OnlineConfig, RewardConfig
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.workflow import resume, run_online
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.reward import RewardTrainingConfig
from tests.online.helpers import pair_rows, rows_of, rows_without_times, write_rows

HERE = Path(__file__).parent
MODELS = ("sft/model", "iteration_2/policy")


def test_function_reward_run_is_complete(config, capsys):
    report = run_online(config)
    run = Path(config.output_dir)
    assert capsys.readouterr().out.splitlines()[-1] == f"model: {run / 'iteration_2' / 'policy'}"
    assert report == run / "report.html" and report.stat().st_size > 0
    rows = rows_without_times(run)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[0]["win_rate"] == 0.5 and rows[1]["num_pairs"] + rows[1]["num_ties"] == 9
    groups = rows_of(run / "iteration_1/scored.jsonl")
    assert len(groups) == 9 and all(len(g["completions"]) == 3 for g in groups)
    for group in groups:
        for completion in group["completions"]:
            ids = completion["token_ids"]
            assert len(completion["sampling_logps"]) == len(ids) <= 8
            assert completion["finished"] == (ids[-1] == 3) and 3 not in ids[:-1]
    assert not list(run.rglob("*.partial"))
    sft, policy = (ModelCard.load(run / name / "README.md") for name in MODELS)
    assert "sft" in sft.data.tags and "- demonstrations: `sft.jsonl`" in sft.text
    assert "dpo" in policy.data.tags and "The policy after 2 of 2 iterations" in policy.text
    for told in ("- prompts: `prompts.jsonl`", "- reward function: `helpers:shorter_is_better`"):
        assert told in policy.text
    assert f"| win_rate | {rows[2]['win_rate']:.4g} |" in policy.text and "seed: 0" in policy.text


def test_sampling_logps_are_the_trainers(config):
    """fp32: what the generator recorded is what the policy computes for the same tokens."""
    import torch

    from rlhf_fast.models.batches import TokenGroup
    from rlhf_fast.models.checkpoint import load_weights
    from rlhf_fast.models.language_model import LanguageModel
    from tests.tiny import tiny_model

    run_online(config)
    run = Path(config.output_dir)
    model = tiny_model()
    load_weights(run / "sft" / "model", model)
    policy = LanguageModel(model, pad_token_id=3, precision="fp32")
    completions = [
        c for g in rows_of(run / "iteration_1/completions.jsonl") for c in g["completions"]
    ]
    groups = [TokenGroup(c["prompt_token_ids"], [c["token_ids"]]) for c in completions]
    logps = torch.tensor(policy.score_groups(groups))[:, 0]
    sampled = torch.tensor([sum(c["sampling_logps"]) for c in completions])
    assert (logps - sampled).abs().mean() < 1e-3


def test_two_runs_are_the_same(config, tmp_path):
    run_online(config)
    run_online(replace(config, output_dir=str(tmp_path / "again")))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "again")


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_reward_model_trained_on_given_pairs_then_loaded(config, tmp_path, parameters):
    training = RewardTrainingConfig(
        parameters=parameters, optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=8)
    )
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    run_online(replace(config, reward=RewardConfig(pairs=pairs, training=training)))
    path = tmp_path / "run" / "reward_model" / "model"
    card = ModelCard.load(path / "README.md")
    assert "- pairs: `pairs.jsonl`" in card.text and "| held_out_accuracy | " in card.text
    again = replace(
        config, output_dir=str(tmp_path / "again"), reward=RewardConfig(model=str(path))
    )
    run_online(again)
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "again")


def test_labeller_trains_a_reward_model(config, tmp_path):
    training = RewardTrainingConfig(parameters="head")
    reward = RewardConfig(labeller="helpers:shorter_is_better", training=training)
    evaluation = EvaluationConfig(judge="helpers:shorter_is_better", num_generations=2)
    run_online(replace(config, reward=reward, evaluation=evaluation))
    assert rows_without_times(tmp_path / "run")[-1]["gold"] < 0


def from_yaml(config: OnlineConfig, tmp_path: Path, text: str) -> OnlineConfig:
    from rlhf_fast.online.config_file import config_from_yaml

    path = tmp_path / "changes.yaml"
    path.write_text(text)
    return config_from_yaml(path, replace(config, reward=RewardConfig()))


@pytest.mark.parametrize(
    ("reward", "components"),
    [
        (
            "labeller: helpers:shorter_is_better\n  training: {parameters: head}\n"
            "  ensemble: {members: 3, reduction: min}",
            {"model_1", "model_2", "model_3"},
        ),
        (
            "parts:\n  - {name: short, function: helpers:shorter_is_better, weight: 0.5}\n"
            "  - {name: even, function: helpers:even_length, is_constraint: true, threshold: 1}\n"
            "  composition: {combination: hierarchical, violation_reward: -100}",
            {"short", "even", "unconstrained"},
        ),
        (
            "parts: [{name: short, function: helpers:shorter_is_better}]\n"
            "  composition: {combination: gated, gate: helpers:gate}",
            {"short"},
        ),
        (
            "function: helpers:shorter_is_better\n"
            "  shaping: {baseline_samples: 2, calibrated: true, length_penalty: 0.001}",
            {"raw"},
        ),
        ("{strong_model: MODEL, weak_model: MODEL, criteria: w40}", set()),
    ],
)
def test_composed_rewards_from_a_file(config, tmp_path, reward, components):
    text = f"reward:\n  {reward}" if not reward.startswith("{") else f"reward: {reward}"
    text = text.replace("MODEL", config.model) + "\nnum_iterations: 1"
    run_online(from_yaml(config, tmp_path, text))
    run = Path(config.output_dir)
    for group in rows_of(run / "iteration_1/scored.jsonl"):
        assert set(group["components"]) == components
    if "baseline" in reward:
        assert len(rows_of(run / "reward_baseline.jsonl")) == 12
    metrics = (run / "metrics.jsonl").read_text()
    resume(run)
    assert (run / "metrics.jsonl").read_text() == metrics


def test_the_members_of_an_ensemble_differ(config, tmp_path):
    text = (
        "reward: {labeller: helpers:shorter_is_better, training: {parameters: head}, "
        "ensemble: {members: 2, reduction: uwo}}\nnum_iterations: 1"
    )
    run_online(from_yaml(config, tmp_path, text))
    group = rows_of(Path(config.output_dir) / "iteration_1/scored.jsonl")[0]
    first, second = group["components"].values()
    assert first != second


def test_without_demonstrations(config):
    run_online(replace(config, data=replace(config.data, demonstrations=None)))
    assert not (Path(config.output_dir) / "sft").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_other_architectures(config, tmp_path, architecture):
    from tests.tiny import tiny_model, tiny_tokenizer

    path = tmp_path / architecture
    tiny_model(architecture).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    run_online(replace(config, model=str(path)))


def command(config: OnlineConfig, tmp_path: Path, *arguments: str, **environment: str):
    from rlhf_fast.online.config_file import config_to_yaml

    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])} | environment
    program = "import sys; from rlhf_fast.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_run_resumes_to_the_same_metrics(config, tmp_path):
    whole = replace(
        config, output_dir=str(tmp_path / "whole"), reward=RewardConfig("helpers:never_killed")
    )
    command(whole, tmp_path, "online", "--config", str(tmp_path / "run.yaml"))
    killed = replace(config, reward=RewardConfig("helpers:killed_in_iteration_2"))
    # Calls of the reward function: 3 + 9 + 3 groups come before iteration 2.
    environment = {"KILL_MARKER": str(tmp_path / "calls"), "KILL_CALL": "17"}
    first = command(
        killed, tmp_path, "online", "--config", str(tmp_path / "run.yaml"), **environment
    )
    assert first.returncode == -9
    run = tmp_path / "run"
    assert (run / "iteration_2" / "completions.jsonl").exists()
    assert not (run / "iteration_2" / "scored.jsonl").exists()
    second = command(killed, tmp_path, "resume", str(run), **environment)
    assert second.returncode == 0, second.stderr
    assert rows_without_times(run) == rows_without_times(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(config, tmp_path):
    run, path = Path(config.output_dir), str(tmp_path / "run.yaml")
    config = replace(config, reward=RewardConfig("helpers:interrupted"))
    first = command(config, tmp_path, "online", "--config", path)
    assert first.returncode == 130
    said = f"rlhf-fast online: interrupted; go on with `rlhf-fast resume {run}`\n"
    assert first.stderr == said
    assert (run / "sft" / "model").is_dir() and not list(run.rglob("*.partial"))
    second = command(config, tmp_path, "resume", str(run), INTERRUPTED="1")
    assert second.returncode == 0, second.stderr
    assert len(rows_without_times(run)) == 3


def test_what_a_scheduler_sends_is_as_ctrl_c(config, tmp_path):
    run, path = Path(config.output_dir), str(tmp_path / "run.yaml")
    data = replace(config.data, demonstrations=None)
    config = replace(config, data=data, reward=RewardConfig("helpers:interrupted"))
    result = command(config, tmp_path, "online", "--config", path, SIGNAL="SIGTERM")
    assert result.returncode == 130
    assert result.stderr.endswith(f"interrupted; go on with `rlhf-fast resume {run}`\n")


def test_two_processes_do_not_share_a_run(config):
    run, _ = RunFolder.open(RunFolder.create(config).path)
    with run, pytest.raises(UserError, match="another process is at work on this run"):
        resume(run.path)
    resume(run.path)


def test_full_disk_loses_nothing(config, tmp_path):
    """A file-size limit stands for a full disk: the SFT model cannot be written."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "from rlhf_fast.cli import main; sys.exit(main())"
    )
    from rlhf_fast.online.config_file import config_to_yaml

    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    result = subprocess.run(
        [sys.executable, "-c", program, "online", "--config", str(tmp_path / "run.yaml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "cannot write" in result.stderr and "Traceback" not in result.stderr
    run = Path(config.output_dir)
    assert not (run / "sft" / "model").exists() and not list(run.rglob("*.partial"))
    resume(run)
    assert len(rows_without_times(run)) == 3


def test_resume_of_a_finished_run_changes_nothing(config):
    run_online(config)
    run = Path(config.output_dir)
    before = (run / "metrics.jsonl").read_text()
    (run / "iteration_2" / "policy" / "README.md").write_text("My own card.")
    resume(run)
    assert (run / "metrics.jsonl").read_text() == before
    assert (run / "iteration_2" / "policy" / "README.md").read_text() == "My own card."


def test_output_dir_in_use_is_not_overwritten(config):
    run_online(config)
    with pytest.raises(UserError, match="is not empty: choose another --output-dir"):
        run_online(config)


def test_run_refused_at_its_start_leaves_the_folder_free(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        run_online(dataclasses.replace(config, model=str(tmp_path / "empty")))
    assert not Path(config.output_dir).exists()
    run_online(config)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "helpers:raises raised ValueError on prompt .*: no such judge"),
        ("returns_nan", "returned nan on prompt"),
        ("returns_too_few", "must return 2 rewards, got 1"),
    ],
)
def test_broken_reward_functions_keep_the_responses(config, function, message):
    broken = replace(config, reward=RewardConfig(function=f"helpers:{function}"))
    way = f"; finished stages are kept: go on with `rlhf-fast resume {config.output_dir}`$"
    with pytest.raises(UserError, match=message + ".*" + way):
        run_online(broken)


def test_constant_reward_gives_no_pair(config):
    with pytest.raises(UserError, match="no preference pair in 9 prompts"):
        run_online(replace(config, reward=RewardConfig(function="helpers:constant")))
    assert (Path(config.output_dir) / "iteration_1" / "scored.jsonl").exists()
