"""The folder of a stand-alone training: who works in it, takes it up again, and is told of it."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import AdapterConfig
from rlhf_fast.training.__main__ import main
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.reward_config import RewardTrainingConfig
from rlhf_fast.training.runs import PreferenceRun, RewardRun, run_preference, run_reward_model
from rlhf_fast.training.session import OutputConfig, Session, changed_settings
from tests.training.launched import LAUNCHERS
from tests.training.run_options import (
    COMPUTE,
    OPTIMIZER,
    OPTIMIZER_SETTINGS,
    common,
    metrics,
    pairs,
)


@pytest.mark.parametrize(
    ("name", "message"),
    [("dvclive", "dvclive cannot be used"), ("paper", "must be among .*tensorboard.*, got paper")],
)
def test_a_tracker_that_cannot_be_used_is_named(name, message, tmp_path, model):
    output = OutputConfig(directory=str(tmp_path / "run"), trackers=(name,))
    with pytest.raises(UserError, match=message):
        run_preference(PreferenceRun(**common(tmp_path, model, pairs(), output=output)))


def test_a_tracker_gets_every_metric_of_every_step(tmp_path, model):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = OutputConfig(directory=str(tmp_path / "run"), trackers=("tensorboard",))
    options = common(tmp_path, model, pairs(), output=output)
    run_preference(PreferenceRun(**options, dpo=DPOConfig(optimizer=OPTIMIZER)))
    rows = metrics(tmp_path)
    files = (tmp_path / "run").rglob("events.out.tfevents.*")  # one more holds the settings
    file = min(files, key=lambda path: len(path.parts))
    events = EventAccumulator(str(file.parent)).Reload()
    for name in ("loss", "grad_norm", "learning_rate"):
        seen = [(e.step, e.value) for e in events.Scalars(name)]
        assert seen == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]


@pytest.mark.parametrize(
    ("launcher", "lora"),
    [*((name, AdapterConfig()) for name in LAUNCHERS), ("sharded", AdapterConfig(rank=4))],
)
def test_two_processes_share_a_run(tmp_path, model, launcher, lora):
    """Data, reference, training and saving by two processes give what one process gives."""
    output = OutputConfig(directory=str(tmp_path / "run"), merge_adapters=lora.rank > 0)
    options = common(tmp_path, model, pairs(), lora=lora, output=output)
    run_preference(PreferenceRun(**options, dpo=DPOConfig(optimizer=OPTIMIZER)))
    again = tmp_path / "again"
    shutil.rmtree(f"{options['data']}.reference")
    command = [*LAUNCHERS[launcher], "-m", "rlhf_fast.training", "preference"]
    settings = {
        "model": model,
        "data": options["data"],
        "output": again,
        "device": "cpu",
        "precision": "fp32",
        **{f"dpo.optimizer.{name}": value for name, value in OPTIMIZER_SETTINGS.items()},
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    if lora.rank:
        command += ["--merge-adapters", "--lora.rank", str(lora.rank)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    for mine, theirs in zip(rows, metrics(tmp_path), strict=True):
        if mine["step"] == 1:  # the policy is its reference: margins are rounding, with any sign
            assert mine.pop("reward_accuracy") <= 1 and theirs.pop("reward_accuracy") <= 1
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    mine = AutoModelForCausalLM.from_pretrained(again / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for a, b in zip(mine.parameters(), theirs.parameters()):
        # AdamW's first steps have the size of the learning rate, whatever the gradient's size.
        assert (a - b).abs().max() < 6 * OPTIMIZER.learning_rate
        assert (a - b).square().mean().sqrt() < 0.05 * OPTIMIZER.learning_rate


def test_an_interruption_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_fast.training.runs.run_sft", interrupted)
    assert main(["sft"]) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_another_run_keeps_out_of_the_folder(tmp_path, model, monkeypatch):
    """Also of one that was interrupted in this process, as in a notebook."""
    options = common(tmp_path, model, pairs())
    run = PreferenceRun(**options, dpo=DPOConfig(optimizer=OPTIMIZER))
    refused = []

    def other(self, row, total):
        with pytest.raises(UserError, match="run: another process is at work on this run"):
            run_preference(run)
        refused.append(main(["sft", "--model", model, "--data", run.data, "--output", folder]))
        raise KeyboardInterrupt

    folder = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "on_step", other)
        with pytest.raises(KeyboardInterrupt) as kept:
            run_preference(run)
    assert refused == [1] and kept.tb
    before = (tmp_path / "run" / "run.json").read_text()
    run_preference(run)
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_changed_settings_are_named():
    before = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 3}
    newer = {"a": 1, "b": {"c": (1, 2), "d": None, "new": 4}, "gone": 3}
    assert changed_settings(before, newer) == []
    after = {"a": 2, "b": {"c": [1], "d": {"e": 5}}}
    changes = ["a 1 -> 2", "b.c [1, 2] -> [1]", "b.d None -> {'e': 5}", "gone 3 -> None"]
    assert changed_settings(before, after) == changes


def interrupted(train, run):
    """The run until its fourth step."""
    shown = Session.on_step

    def interrupt(self, row, total):
        if row["step"] == 4:
            raise KeyboardInterrupt
        shown(self, row, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "on_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(run)


def test_a_reward_run_that_was_interrupted_is_continued(tmp_path, model):
    training = RewardTrainingConfig(num_outputs=2, optimizer=OPTIMIZER)
    output = OutputConfig(directory=str(tmp_path / "run"), checkpoint_steps=2)
    run = RewardRun(**common(tmp_path, model, pairs(), output=output), training=training)
    interrupted(run_reward_model, run)
    path = run_reward_model(run)
    resumed, weights = metrics(tmp_path), load_file(path / "model.safetensors")
    shutil.rmtree(tmp_path / "run")
    path = run_reward_model(replace(run, output=replace(output, checkpoint_steps=0)))
    assert resumed == metrics(tmp_path)
    for name, value in load_file(path / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_a_run_that_was_interrupted_is_continued(tmp_path, model):
    output = OutputConfig(directory=str(tmp_path / "run"), checkpoint_steps=1)
    options = common(tmp_path, model, pairs(), output=output)
    config = DPOConfig(optimizer=OPTIMIZER)
    interrupted(run_preference, PreferenceRun(**options, dpo=config))
    saved = (tmp_path / "run" / "run.json").read_text()
    other = replace(config, beta=0.3)
    with pytest.raises(UserError, match=r"run with other settings: dpo.beta 0.1 -> 0.3;"):
        run_preference(PreferenceRun(**options, dpo=other))
    assert (tmp_path / "run" / "run.json").read_text() == saved
    options["compute"] = replace(COMPUTE, micro_batch_tokens=64)  # changes no result
    path = run_preference(PreferenceRun(**options, dpo=config))
    resumed, resumed_model = metrics(tmp_path), AutoModelForCausalLM.from_pretrained(path)
    whole = options | {"output": OutputConfig(directory=str(tmp_path / "whole"))}
    path = run_preference(PreferenceRun(**whole, dpo=config))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert resumed == [json.loads(line) for line in lines]
    for mine, theirs in zip(
        resumed_model.parameters(), AutoModelForCausalLM.from_pretrained(path).parameters()
    ):
        assert torch.equal(mine, theirs)
