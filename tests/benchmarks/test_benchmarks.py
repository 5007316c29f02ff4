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
