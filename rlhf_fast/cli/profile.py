"""`rlhf-fast profile`: a run whose stages are timed and, where asked, traced."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from rlhf_fast.online.progress import Progress
from rlhf_fast.online.run_folder import RunFolder

SHOWN_OPERATIONS = 15


class ProfilingProgress(Progress):
    """Traces the stages that match a pattern, of a training stage the first optimiser steps."""

    def __init__(self, folder: Path, pattern: str, max_steps: int) -> None:
        super().__init__()
        self.folder = folder
        self.pattern = pattern
        self.max_steps = max_steps
        self.tables: dict[str, str] = {}
        self._profiler: profile | None = None
        self._stage = ""
        self._steps = 0

    def announce(self, stage: str, seconds: float | None) -> None:
        if seconds is None and self._profiler is None and fnmatch(stage, self.pattern):
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=activities)
            self._stage, self._steps = stage, 0
            self._profiler.start()
        elif seconds is not None and stage == self._stage:
            self._finish()
        super().announce(stage, seconds)

    def step(self, metrics: dict[str, float], total: int) -> None:
        super().step(metrics, total)
        self._steps += 1
        if self._steps >= self.max_steps:
            self._finish()

    def _finish(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self._stage.replace("/", "-")
        profiler.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tables[self._stage] = profiler.key_averages().table(
            sort_by=f"self_{device}_time_total",
            row_limit=SHOWN_OPERATIONS,
            max_name_column_width=60,
        )


def print_stages(run: Path, console: Console | None = None) -> None:
    """Seconds of every stage of a run, and their share."""
    opened, _ = RunFolder.open(run)
    stages = [s for s in opened.manifest()["stages"] if "seconds" in s]
    total = sum(s["seconds"] for s in stages)
    table = Table(title=f"Stages of {run}")
    for column in ("stage", "seconds", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in stages:
        share = stage["seconds"] / total if total else 0.0
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", f"{share:.0%}")
    table.add_row("all stages", f"{total:.1f}", "")
    (console or Console()).print(table)
