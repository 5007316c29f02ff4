"""Compares this working tree with another revision: both builds run in turns."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import harness, report

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
        subprocess.run(build, cwd=folder, env=os.environ | kernels, check=True)
        (folder / "built").touch()
    return folder


def compare(revision: str, arguments: list[str], rounds: int = 3) -> None:
    """Prints our medians before and after; each is the median over `rounds` processes."""
    trees = {"before": built(revision), "after": ROOT}
    medians: dict[report.Case, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as results:
                env = {**os.environ, harness.RESULTS_VARIABLE: results, "PYTHONPATH": str(tree)}
                command = [sys.executable, "-m", "benchmarks", *arguments, "--save"]
                command += ["--only", report.OURS]
                subprocess.run(command, cwd=tree, env=env, check=True, stdout=subprocess.DEVNULL)
                for path in Path(results).glob("*.csv"):
                    for row in report.load(path):
                        case = (*report.case_of(row), row["contestant"])
                        times = medians.setdefault(case, {"before": [], "after": []})
                        times[name].append(float(row["median_ms"]))
    print(f"{'case':90} {'before':>9} {'after':>9} {'ratio':>6}")
    for case, times in medians.items():
        if times["before"] and times["after"]:
            before, after = (statistics.median(times[n]) for n in ("before", "after"))
            title = ", ".join(part for part in case if part)
            print(f"{title[:90]:90} {before:9.3f} {after:9.3f} {after / before:6.2f}")
