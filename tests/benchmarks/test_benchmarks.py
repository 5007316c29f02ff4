"""Every benchmark runs at a small shape; each checks its contestants before it times them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("stem", ["logps"])
def test_benchmark_runs(stem):
    options = ["--tokens", "16", "--vocab", "1000", "--threads", "1", "--malloc", "default"]
    options += ["--seconds", "0.05", "--only", "rlhf_fast", "eager"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", stem, *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "rlhf_fast, in place" in result.stdout and "floors:" in result.stdout


def test_training_benchmark_runs():
    options = ["--model", "tiny", "--lengths", "8/8", "mixed", "--pairs", "2", "--steps", "3"]
    options += ["--threads", "1", "--malloc", "default", "--dtype", "float32"]
    options += ["--only", "rlhf_fast", "plain"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "training", *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("losses agree over 3 steps") == 2
