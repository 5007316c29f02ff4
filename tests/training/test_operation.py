"""What must not change a training run: how it is split, killed, resumed or shared out."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.engine import share_out
from rlhf_fast.training.fit import FitOptions, OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from tests.tiny import tiny_model
from tests.training.examples import make_pairs

CONFIG = OptimizerConfig(learning_rate=1e-3, num_epochs=10, batch_size=8)


def command(kind, directory, *more):
    return [sys.executable, "-m", "tests.training.launched", kind, str(directory), *more]


def result_of(kind, directory, launcher=(), env=None):
    directory.mkdir(exist_ok=True)
    line = [*launcher, *command(kind, directory)[1:]] if launcher else command(kind, directory)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((directory / "result.json").read_text())


def test_killed_at_any_moment_and_resumed_it_is_bit_for_bit_the_same(tmp_path):
    expected = result_of("dpo", tmp_path / "whole")
    directory = tmp_path / "killed"
    directory.mkdir()
    for steps_until_killed in (1, 5, 4):
        process = subprocess.Popen(
            command("dpo", directory, "0.05"), stdout=subprocess.PIPE, text=True
        )
        for _ in range(steps_until_killed):
            assert process.stdout.readline().startswith("step")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert [p.name for p in (directory / "checkpoints").glob("step_?")] == ["step_6"]
    assert result_of("dpo", directory) == expected


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return result_of("sft", tmp_path_factory.mktemp("one"))


def test_two_processes_follow_one(tmp_path, one_process):
    compare(result_of("sft", tmp_path / "two", LAUNCHER), one_process)


def test_sharded_over_two_processes_follows_one(tmp_path, one_process):
    compare(result_of("sft", tmp_path / "two", LAUNCHER, {"SHARDED": "1"}), one_process)


def compare(result, expected):
    assert len(result["rows"]) == len(expected["rows"]) == 20
    for mine, theirs in zip(result["rows"], expected["rows"]):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert result["weights"] == pytest.approx(expected["weights"], rel=1e-2, abs=1e-2)


def trajectory(**options):
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32", **options)
    reference = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    pairs = make_pairs(16)
    rows = train_dpo(model, reference, pairs, config=DPOConfig(optimizer=CONFIG), seed=0)
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows])


def test_accumulation_and_layout_change_nothing():
    """20 steps with 1 x 8, 2 x 4 and 8 x 1 pairs, padded and packed: loss and gradient norm."""
    whole = trajectory()
    assert len(whole) == 20
    for options in (
        {"micro_batch_tokens": 130},
        {"micro_batch_tokens": 1},
        {"row_tokens": 100},
        {"row_tokens": 64, "micro_batch_tokens": 64},
    ):
        torch.testing.assert_close(trajectory(**options), whole, rtol=2e-3, atol=2e-4)


def test_gradient_checkpointing_changes_nothing():
    whole = trajectory()
    torch.testing.assert_close(trajectory(gradient_checkpointing=True), whole, rtol=1e-4, atol=1e-5)


def test_the_weight_average_is_the_result():
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    reference = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    initial = [p.detach().clone() for p in model.model.parameters()]
    config = OptimizerConfig(learning_rate=1e-3, batch_size=8, ema_decay=0.999)
    seen = []

    def on_step(row, total):
        seen.append([p.detach().clone() for p in model.model.parameters()])

    train_dpo(
        model,
        reference,
        make_pairs(16),
        config=DPOConfig(optimizer=config),
        seed=0,
        on_step=on_step,
    )
    for p, start, first, second in zip(model.model.parameters(), initial, *seen):
        expected = start * 0.1 + first * 0.9  # decay (1 + 0) / (10 + 0)
        expected = expected * (2 / 11) + second * (9 / 11)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = FitOptions(Checkpoints(tmp_path, every_steps=1))
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    pairs, config = make_pairs(8), DPOConfig(optimizer=replace(CONFIG, num_epochs=1))
    train_dpo(model, model, pairs, config=config, seed=0, options=options)
    with pytest.raises(UserError, match="other data or settings"):
        train_dpo(model, model, pairs, config=config, seed=1, options=options)
    file = tmp_path / "step_1" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="damaged checkpoint"):
        train_dpo(model, model, pairs, config=config, seed=0, options=options)


def test_shares_are_even_and_complete():
    sizes = [50, 1, 1, 20, 30, 7]
    shares = share_out(sizes, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert {sum(sizes[i] for i in share) for share in shares} == {52, 57}
    assert share_out([5], 2) == [[0], []]
