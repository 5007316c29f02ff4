"""Timing contestants against each other: interleaved runs, median and spread, peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


clock = time.perf_counter
"""time.process_time on a machine that others use as well; it counts all threads."""


def time_all(
    contestants: list[Contestant],
    repeats: int,
    seconds: float,
    *,
    on_failure: Callable[[str, Exception], None] | None = None,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds of every run; each round runs all contestants, so a busy moment hits all.

    With `on_failure`, a contestant that raises when it warms up is told to it and left out. One
    that takes more than `limit` seconds, then and when it runs once more, is named and left out;
    one that has taken so long in all its runs gets no more of them.
    """
    ready = []
    for contestant in contestants:
        try:
            contestant.prepare()
            took = _seconds(contestant.run)
            if took > limit:  # perhaps with compilation
                contestant.prepare()
                took = _seconds(contestant.run)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(contestant.name, error)
            continue
        if took > limit:
            print(
                f"  without {contestant.name}: one run takes {took:.2g} s, the limit is {limit:g}"
            )
        else:
            ready.append(contestant)
    times: dict[str, list[float]] = {c.name: [] for c in ready}
    deadline = time.monotonic() + seconds
    for done in range(repeats):
        if done >= 3 and time.monotonic() > deadline:
            break
        for contestant in ready:
            if sum(times[contestant.name]) > limit * 1e3:
                continue
            contestant.prepare()
            times[contestant.name].append(milliseconds(contestant.run))
    return times


def _seconds(run: Callable[[], object]) -> float:
    start = time.monotonic()
    run()
    synchronize()
    return time.monotonic() - start


def milliseconds(run: Callable[[], object]) -> float:
    """Of one run; on CUDA by its events, with nothing of the inputs left in the L2 cache."""
    if not torch.cuda.is_available():
        start = clock()
        run()
        return (clock() - start) * 1e3
    _l2_filler().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _l2_filler() -> torch.Tensor:
    """Larger than any L2 cache so far."""
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "p20_ms": round(pick(0.2), 3),
        "p80_ms": round(pick(0.8), 3),
        "runs": len(ordered),
    }


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Most memory held at once beyond what was held before, by CUDA's allocator or the process.

    On the CPU holes count that malloc keeps between blocks: more of them where it is tuned to keep
    freed memory, of which only what was freed before the run is given back first.
    """
    gc.collect()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def peak_is_known() -> bool:
    """Whether `peak_extra_bytes` can see what a run allocates."""
    if torch.cuda.is_available():
        return True
    return sys.platform == "linux"


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
