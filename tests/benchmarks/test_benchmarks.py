"""Every benchmark runs at a small shape; each checks its contestants before it times them."""

import subprocess
import sys

import pytest

SMALL = ["--threads", "1", "--malloc", "default", "--seconds", "0.05"]
OPTIONS = {
    "logps": ["--tokens", "16", "--vocab", "1000", "--only", "rlhf_fast", "eager"],
}
for stem in ("list_loss", "preference_loss", "reward_model_loss", "segment_sum"):
    OPTIONS[stem] = ["--batch", "16", "--length", "32", "--only", "rlhf_fast", "eager"]
for stem in ("gae", "group_advantages", "policy_loss", "value_loss", "whiten"):
    OPTIONS[stem] = ["--batch", "8", "--length", "32", "--only", "rlhf_fast", "eager"]


@pytest.mark.parametrize("stem", OPTIONS)
def test_benchmark_runs(stem):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", stem, *SMALL, *OPTIONS[stem]],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "rlhf_fast" in result.stdout and "x floor" in result.stdout


def test_training_benchmark_runs():
    options = ["--model", "tiny", "--lengths", "8/8", "mixed", "--pairs", "2", "--steps", "3"]
    options += ["--threads", "1", "--malloc", "default", "--dtype", "float32"]
    options += ["--only", "rlhf_fast", "plain", "--task", "dpo", "reward", "sft"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "training", *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("losses agree over 3 steps") == 6


@pytest.mark.parametrize(
    "options",
    [
        ["linear_logps"],
        ["linear_logps", "--grow"],
        ["linear_preference_loss"],
        ["linear_policy_loss"],
    ],
    ids=" ".join,
)
def test_head_benchmark_runs(options):
    options = [*options, "--tokens", "64", "--vocab", "500", "--width", "16", "--threads", "1"]
    options += ["--malloc", "default", "--seconds", "0.05", "--only", "rlhf_fast", "eager"]
    command = [sys.executable, "-m", "benchmarks", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "trainable head" in result.stdout
