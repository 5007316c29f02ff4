"""Every benchmark runs at its smallest shape; each checks its contestants before it times them."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import benchmarks
from benchmarks import harness
from benchmarks.smallest import OPS, PROCESSES

ONLY = ["--only", "rlhf_fast", "eager"]


def run(stem, *options):
    command = [sys.executable, "-m", "benchmarks", stem, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_benchmark_is_run_here():
    stems = {p.stem.removeprefix("bench_") for p in Path(benchmarks.__path__[0]).glob("bench_*.py")}
    assert stems == {*OPS, *PROCESSES}, "say in benchmarks/smallest.py how small it can be"


@pytest.mark.parametrize("stem", OPS)
def test_op(stem):
    shown = run(stem, *OPS[stem], *ONLY)
    assert "rlhf_fast" in shown and "eager" in shown and "x floor" in shown


@pytest.mark.parametrize("stem", ["linear_logps", "linear_policy_loss"])
def test_heads_grow(stem):
    assert "trainable head" in run(stem, *OPS[stem], "--sweep", "tokens", *ONLY)


def test_training():
    shown = run("training", *PROCESSES["training"], "--only", "rlhf_fast", "plain")
    assert shown.count("losses agree over 3 steps") == 6


def test_online():
    shown = run("online", *PROCESSES["online"])
    assert "2 iterations: 4 prompts x 3 responses" in shown
    expected = "rewards and losses agree" if find_spec("trl") else "ours runs alone"
    assert expected in shown


def test_integrations():
    shown = run("integrations", *PROCESSES["integrations"])
    expected = "losses agree" if find_spec("trl") else "nothing to compare with"
    assert expected in shown


def test_absent_contestants_are_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert harness.absent() == ["TRL", "Liger", "CCE", "QuACK", "verl", "OpenRLHF"]
    assert harness.describe()["absent"] == "TRL,Liger,CCE,QuACK,verl,OpenRLHF"


def test_ops_run_through_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/", "-k", "whiten or gae"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout[-3000:]
