"""A contestant in a process of its own: it makes a step for each line it reads, and answers with
loss and times, or at the end with its peak memory, as a line of JSON."""

from __future__ import annotations

import json
import sys
import time

import torch


def answer(**values: object) -> None:
    print("@" + json.dumps(values), flush=True)


def wait() -> bool:
    """Until the parent asks for a step; False if it wants no more."""
    return bool(sys.stdin.readline())


class Stopwatch:
    """Answers the parent's requests, one per optimiser step."""

    def start(self) -> None:
        if not wait():
            answer(peak_bytes=peak_bytes())
            sys.exit(0)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, loss: float, **facts: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        answer(loss=loss, wall_ms=wall * 1e3, cpu_ms=cpu * 1e3, **facts)


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) << 10
