"""Sweeps fit and plot how cost grows."""

import csv
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, sweep


def test_exponents_are_those_of_powers():
    sizes = (1, 2, 4, 8, 16)
    for k in (0.0, 1.0, 2.0):
        assert sweep.exponent((x, 3 * x**k) for x in sizes) == pytest.approx(k)


def test_growth_is_measured_fitted_saved_and_plotted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    held = []

    def curves(sizes, dtype):
        held.append(dict(sizes))
        return {"grows": lambda: torch.empty(sizes["tokens"] << 16, dtype=dtype).fill_(1)}

    whole = lambda sizes, dtype: ("square", sizes["tokens"] ** 2 << 20)  # noqa: E731
    module = SimpleNamespace(SWEEP=("tokens", "vocab"), curves=curves, whole=whole)
    args = dict(tokens=64, vocab=[4, 8], dtype=["float32"], seconds=0.01, save=True)
    sweep.run("toy", module, SimpleNamespace(**args, sweep=["tokens"]))
    assert [sizes["tokens"] for sizes in held] == [16, 32, 64, 128, 256]
    assert {sizes["vocab"] for sizes in held} == {4}
    with next((tmp_path / "sweeps").glob("*.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["curve"] == "grows"]
    extra = sweep.exponent((int(r["size"]), float(r["extra_bytes"])) for r in rows)
    assert 0.9 < extra < 1.1
    assert "square" in capsys.readouterr().out
    plots = {path.suffix for path in (tmp_path / "sweeps").iterdir()}
    assert plots == {".csv", ".png", ".svg"}


def test_only_the_newest_sizes_are_plotted():
    facts = {"dtype": "float32", "threads": 1, "malloc": "default", "swept": "tokens", "size": 4}
    rows = [
        {**facts, "sizes": "tokens=8", "curve": "gone", "median_ms": 1},
        {**facts, "sizes": "tokens=4", "curve": "ours", "median_ms": 2},
        {**facts, "sizes": "tokens=4", "curve": "ours", "median_ms": 3},
    ]
    assert sweep.newest(rows) == rows[2:]


SIZES = {
    "gae": {"batch": 2, "length": 8},
    "list_loss": {"batch": 2, "generations": 4},
    "logps": {"tokens": 4, "vocab": 50},
    "preference_loss": {"batch": 3, "length": 8},
}


@pytest.mark.parametrize("stem", SIZES)
def test_benchmarks_take_part(stem):
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    assert module.SWEEP == tuple(SIZES[stem])
    for run in module.curves(SIZES[stem], torch.float32).values():
        run()


def test_a_benchmark_without_sizes_is_refused_by_name():
    command = [sys.executable, "-m", "benchmarks", "whiten", "gae", "--sweep"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "got whiten" in done.stderr and "gae" in done.stderr
