"""Every op's contestants through pytest-benchmark, at the smallest shape or at sizes given.

    pytest benchmarks/ --benchmark-group-by=group
    RLHF_FAST_BENCHMARK_SIZES="--vocab 49152 --tokens 512" pytest benchmarks/ -k logps

A contestant is checked against float64 before it is timed; one test runs all kinds of an op.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import options
from benchmarks.smallest import OPS

SIZES = os.environ.get("RLHF_FAST_BENCHMARK_SIZES", "").split()


def contestants(stem: str, name: str, monkeypatch) -> list[harness.Contestant]:
    """What `python -m benchmarks STEM` would time, after its checks."""
    found: list[harness.Contestant] = []

    def collect(entries, repeats, seconds):
        found.extend(entries)
        return {entry.name: [1.0] * 3 for entry in entries}

    monkeypatch.setattr(harness, "time_all", collect)
    args = options([stem, *OPS[stem], *SIZES, "--only", name])
    importlib.import_module(f"benchmarks.bench_{stem}").run(args)
    return [c for c in found if c.name.startswith(name)]


@pytest.mark.parametrize("name", ["rlhf_fast", "eager"])
@pytest.mark.parametrize("stem", OPS)
def test_op(stem, name, benchmark, monkeypatch):
    torch.set_num_threads(1)
    benchmark.group = stem
    found = contestants(stem, name, monkeypatch)
    assert found, f"{name} does not take part in {stem}"

    def prepare():
        for contestant in found:
            contestant.prepare()

    def run():
        for contestant in found:
            contestant.run()
        harness.synchronize()

    benchmark.pedantic(run, setup=prepare, rounds=5, warmup_rounds=1)
