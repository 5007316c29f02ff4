"""Compares this working tree with another revision: both builds run in turns."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import harness, report
from benchmarks.plan import Plan

ROOT = Path(__file__).resolve().parents[1]


def built(revision: str) -> Path:
    """A checkout of `revision` with its kernels compiled, kept under build/against."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", f"{revision}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise SystemExit(
            f"--against must name a revision, got {revision!r}: {found.stderr.strip()}"
        )
    folder = ROOT / "build" / "against" / found.stdout.strip()
    if not (folder / "built").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        archive = subprocess.run(
            ["git", "archive", found.stdout.strip()], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        print(f"building {found.stdout.strip()} in {folder} ...", flush=True)
        # Without a GPU its kernels cannot be timed, and they take minutes to compile.
        kernels = {} if torch.cuda.is_available() else {"RLHF_FAST_CUDA": "OFF"}
        done = subprocess.run(
            build, cwd=folder, env=os.environ | kernels, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{revision} does not build here:\n{done.stdout}{done.stderr}")
        (folder / "built").touch()
    return folder


ROUNDS = 3


def compare(revision: str, chosen: dict[str, Plan], rest: list[str]) -> None:
    """Prints our medians before and after; each is the median over `ROUNDS` processes."""
    trees = {"before": built(revision), "after": ROOT}
    position = next(i for i, word in enumerate(rest) if word.startswith("--against"))
    rest = rest[:position] + rest[position + (1 if "=" in rest[position] else 2) :]
    medians: dict[report.Case, dict[str, list[float]]] = {}
    for number, (stem, plan) in itertools.product(range(1, ROUNDS + 1), chosen.items()):
        for name, tree in trees.items():
            print(f"round {number} of {ROUNDS}: {stem}, {name}", flush=True)
            for row in measure(tree, [stem, *plan.options, *rest]):
                case = (*report.case_of(row), row["contestant"])
                times = medians.setdefault(case, {"before": [], "after": []})
                times[name].append(float(row["median_ms"]))
    show(medians)


def measure(tree: Path, arguments: list[str]) -> list[report.Row]:
    """What the benchmarks of a tree say of its package; nothing is added to its results."""
    with tempfile.TemporaryDirectory() as results:
        env = {**os.environ, harness.RESULTS_VARIABLE: results, "PYTHONPATH": str(tree)}
        command = [sys.executable, "-m", "benchmarks", *arguments, "--save", "--only", report.OURS]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree}: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return [row for path in Path(results).glob("*.csv") for row in report.load(path)]


def show(medians: dict[report.Case, dict[str, list[float]]]) -> None:
    print(f"{'case':90} {'before':>9} {'after':>9} {'ratio':>6}")
    for case, times in medians.items():
        if times["before"] and times["after"]:
            before, after = (statistics.median(times[n]) for n in ("before", "after"))
            title = ", ".join(part for part in case if part)
            print(f"{title[:90]:90} {before:9.3f} {after:9.3f} {after / before:6.2f}")
