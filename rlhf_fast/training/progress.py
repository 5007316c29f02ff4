"""A bar while training: step, loss, tokens per second, memory, time left."""

from __future__ import annotations

import resource
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows the optimiser steps; where there is no terminal, a line every now and then."""

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Console()
        self.title = title
        self._bar: Progress | None = None
        self._started = self._printed = time.monotonic()
        self._tokens = 0

    def step(self, metrics: dict[str, float], total: int) -> None:
        """Called after every optimiser step."""
        now = time.monotonic()
        self._tokens += int(metrics["num_tokens"])
        note = (
            f"loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3g}  "
            f"{self._tokens / max(now - self._started, 1e-9):,.0f} tokens/s  "
            f"{peak_memory_bytes() / 2**30:.1f} GiB"
        )
        if self.console.is_terminal:
            self._draw(note, int(metrics["step"]), total)
        elif now - self._printed > self.SECONDS_BETWEEN_LINES or metrics["step"] == total:
            self._printed = now
            line = f"{self.title}: step {metrics['step']}/{total}  {note}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _draw(self, note: str, step: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._bar.add_task(self.title, total=total, note="")
        self._bar.update(self._bar.task_ids[0], completed=step, note=note)


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
