"""Check, then time: contestants interleaved, median and spread, one CSV row per measurement."""

from __future__ import annotations

import csv
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from rlhf_fast import timing
from rlhf_fast.timing import (
    TUNED_MALLOC,
    Contestant,
    peak_extra_bytes,
    peak_is_known,
    quantiles,
    synchronize,
)

__all__ = [
    "TUNED_MALLOC",
    "Contestant",
    "peak_extra_bytes",
    "peak_is_known",
    "quantiles",
    "synchronize",
    "time_all",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS_VARIABLE = "RLHF_FAST_BENCHMARK_RESULTS"
RESULTS = Path(os.environ.get(RESULTS_VARIABLE) or Path(__file__).with_name("results"))
COMMAND_VARIABLE = "RLHF_FAST_BENCHMARK_COMMAND"
"""What the user has called: set in the processes that measure."""
STARTED = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "_").lower()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip().replace(" ", "_").lower()
    return platform.machine()


def processor() -> str:
    """The name of what is measured; a CPU's with its generation, as virtual ones hide the model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.partition(":")[::2] for line in lines)
    found = {name.strip(): value.strip() for name, value in pairs}
    name = found.get("model name", platform.machine())
    generation = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{name} ({generation}), {os.cpu_count()} cores"


def commit() -> str:
    """The revision; "-dirty" where its sources, results apart, have been changed since.

    RLHF_FAST_BENCHMARK_COMMIT says it on a machine that has a copy of the sources alone.
    """
    if told := os.environ.get("RLHF_FAST_BENCHMARK_COMMIT"):
        return told
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=here)
        return done.stdout.strip()

    results = (":(top,exclude)benchmarks/results", ":(top,exclude)README.md", ":(top,exclude)docs")
    changed = git("status", "--porcelain", "-uno", "--", ":/", *results)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


PEERS = {
    "TRL": "trl",
    "Liger": "liger_kernel",
    "CCE": "cut_cross_entropy",
    "QuACK": "quack",
    "verl": "verl",
    "OpenRLHF": "openrlhf",
}
"""Contestants from other packages, and what these are called when imported."""


def absent() -> list[str]:
    """Who cannot take part, as its package is not installed."""
    return [name for name, package in PEERS.items() if find_spec(package) is None]


def shown_command(words: list[str]) -> str:
    """Where something lies on this machine is nothing to others."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


def describe() -> dict[str, object]:
    import rlhf_fast

    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
    command = shown_command(["python -m", module, *sys.argv[1:]])
    return {
        "date": STARTED,
        "device": processor(),
        "commit": commit(),
        "command": os.environ.get(COMMAND_VARIABLE) or command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlhf_fast": rlhf_fast.__version__,
        "threads": torch.get_num_threads(),
        "malloc": "tuned" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "default",
        "clock": timing.clock.__name__,
        "load": round(os.getloadavg()[0], 1),
        "absent": ",".join(absent()),
    }


FACTS = (
    *("date", "device", "commit", "command", "python", "torch", "rlhf_fast"),
    *("threads", "malloc", "clock", "load"),
)
COLUMNS = (
    *FACTS,
    *("stem", "kind", "dtype", "shape", "contestant", "median_ms", "p20_ms", "p80_ms", "runs"),
    *("floor_ms", "rms_error", "details"),
)
SHAPE = ("tokens", "vocab", "width", "batch", "length", "lengths", "pairs", "model")


def as_record(stem: str, row: dict[str, object]) -> dict[str, object]:
    """A measurement as one line of the long table; what has no column goes to details."""
    shape = " ".join(f"{name}={row[name]}" for name in SHAPE if name in row)
    rest = {k: v for k, v in row.items() if k not in (*COLUMNS, *SHAPE)}
    known = {name: row.get(name, "") for name in COLUMNS}
    details = " ".join(f"{name}={value}" for name, value in rest.items())
    return {**known, "stem": stem, "shape": shape, "details": details}


def record(stem: str, rows: list[dict[str, object]]) -> Path:
    """Appends measurements to results/<device>.csv."""
    return append(RESULTS / f"{device_name()}.csv", [as_record(stem, row) for row in rows])


def append(
    path: Path, records: list[dict[str, object]], columns: tuple[str, ...] = COLUMNS
) -> Path:
    """Adds lines to a table, which gets the columns that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            held = [] if tuple(reader.fieldnames or ()) == columns else list(reader)
    is_new = not path.exists() or bool(held)
    with path.open("w" if is_new else "a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows([*held, *records])
    return path


FAILURES = "failures.txt"


def fail(name: str, error: BaseException) -> None:
    """Notes that a contestant does not take part; the command ends with an error because of it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"  without {name}: {text}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / FAILURES).open("a") as file:
        file.write(f"{name}: {text}\n")


def failures(folder: Path) -> list[str]:
    path = folder / FAILURES
    return list(dict.fromkeys(path.read_text().splitlines())) if path.exists() else []


def checked(functions: dict[str, Callable], check: Callable[[Callable], float]) -> dict[str, float]:
    """RMS error by name, as `check` finds it, of the contestants that pass."""
    errors = {}
    for name, function in functions.items():
        try:
            errors[name] = check(function)
        except Exception as error:  # whatever another project's code raises
            fail(name, error)
    return errors


def time_all(
    contestants: list[Contestant], repeats: int, seconds: float, limit: float = math.inf
) -> dict[str, list[float]]:
    """As `rlhf_fast.timing.time_all`, but one that fails is named and left out."""
    return timing.time_all(contestants, repeats, seconds, on_failure=fail, limit=limit)


def chosen(functions: dict[str, object], args) -> dict[str, object]:
    """Those whose name contains a word of --only."""
    words = args.only or [""]
    return {n: f for n, f in functions.items() if any(word in n for word in words)}


def fitting(contestants: dict[str, Callable], num_bytes: int, copies: int) -> dict[str, Callable]:
    """Those that fit into free memory; the others are named.

    Beside inputs of which one takes `num_bytes` others hold up to `copies` of it, we one gradient.
    """
    free = _free_bytes()
    fit = {}
    for name, function in contestants.items():
        needed = num_bytes * (1 if name.startswith("rlhf_fast") else copies)
        if needed <= free:
            fit[name] = function
        else:
            print(f"  without {name}: takes about {needed >> 20} MiB, {free >> 20} MiB are free")
    return fit


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LookupError("MemAvailable")


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
        if c.name in times
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


def race(
    stem: str,
    kind: str,
    contestants: dict[str, Callable[[], object]],
    check: Callable[[Callable], float],
    args,
    floor: float | dict[str, Callable[[], object]],
) -> None:
    """Checks contestants, then times them on one batch of sequences.

    The floor is milliseconds, or what nothing can beat (`benchmarks.one_pass`): it is timed in turn
    with the contestants, and the first one's median is the floor.
    """
    wanted = chosen(contestants, args)
    errors = checked(wanted, check)
    limits = floor if isinstance(floor, dict) else {}
    errors |= dict.fromkeys(limits, float("nan"))
    runs = limits | wanted
    times = time_all([Contestant(n, runs[n]) for n in errors], 100, args.seconds)
    floor_ms = quantiles(times[next(iter(limits))])["median_ms"] if limits else floor
    rows = [
        {
            **describe(),
            "kind": kind,
            "batch": args.batch,
            "length": args.length,
            "contestant": name,
            **quantiles(times[name]),
            "floor_ms": round(floor_ms, 6),
            "rms_error": errors[name],
        }
        for name in times
    ]
    print_table(f"{stem}, {kind}, {args.batch} x {args.length}", rows)
    if args.save:
        print("saved to", record(stem, rows))
