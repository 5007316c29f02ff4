"""Check, then time: contestants interleaved, median and spread, one CSV row per measurement."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results")

# glibc gives large blocks back to the system and faults them in again at the next call. With these
# settings it keeps them, which makes plain PyTorch several times faster: the fair opponent.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


@dataclass
class Contestant:
    name: str
    run: Callable[[], object]
    """What is timed."""
    prepare: Callable[[], object] = lambda: None
    """Runs before each timing, untimed: restores inputs that `run` overwrites."""
    error: float = float("nan")
    """RMS error against float64, filled in by the check."""


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "_").lower()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip().replace(" ", "_").lower()
    return platform.machine()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_all(contestants: list[Contestant], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every run; each round runs all contestants, so a busy moment hits all."""
    for contestant in contestants:
        contestant.prepare()
        contestant.run()
    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    deadline = time.monotonic() + seconds
    for done in range(repeats):
        if done >= 3 and time.monotonic() > deadline:
            break
        for contestant in contestants:
            contestant.prepare()
            synchronize()
            start = time.perf_counter()
            contestant.run()
            synchronize()
            times[contestant.name].append((time.perf_counter() - start) * 1e3)
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "p20_ms": round(pick(0.2), 3),
        "p80_ms": round(pick(0.8), 3),
        "runs": len(ordered),
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def describe() -> dict[str, object]:
    import rlhf_fast

    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlhf_fast": rlhf_fast.__version__,
        "threads": torch.get_num_threads(),
        "malloc": "tuned" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "default",
        "load": round(os.getloadavg()[0], 1),
    }


def record(stem: str, rows: list[dict[str, object]]) -> Path:
    """Appends rows to results/<stem>-<device>.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stem}-{device_name()}.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def contest(
    title: str, facts: dict, contestants: list[Contestant], floor_ms: float, seconds: float
) -> list[dict[str, object]]:
    """Times contestants against each other; prints a table, returns its CSV rows."""
    times = time_all(contestants, 30, seconds)
    rows = [
        {
            **describe(),
            **facts,
            "contestant": c.name,
            **quantiles(times[c.name]),
            "floor_ms": round(floor_ms, 3),
            "rms_error": float(f"{c.error:.3g}"),
        }
        for c in contestants
    ]
    print_table(f"{title}, floor {floor_ms:.1f} ms", rows)
    return rows


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    print(f"\n{title}")
    print(
        f"  {'contestant':28} {'median':>9} {'p20':>9} {'p80':>9} {'x floor':>8} {'RMS error':>10}"
    )
    for row in rows:
        print(
            f"  {row['contestant']:28} {row['median_ms']:9.3f} {row['p20_ms']:9.3f} "
            f"{row['p80_ms']:9.3f} {row['median_ms'] / row['floor_ms']:8.2f} "
            f"{row['rms_error']:10.1e}"
        )
