"""What the terminal shows: a line per finished stage, a bar while it trains, a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from rlhf_fast.launch import Launch


class Progress:
    """Announces stages and optimiser steps on a console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar: RichProgress | None = None

    @classmethod
    def of(cls, launch: Launch) -> Progress:
        """Of one of the processes of a launch: the main one speaks."""
        return cls(Console(quiet=not launch.is_main))

    def announce(self, stage: str, seconds: float | None) -> None:
        """Called when a stage starts (`seconds` None) and when it ends."""
        self._stop_bar()
        if seconds is not None:
            self.console.print(f"[green]✓[/] {stage:<28} [dim]{seconds:7.1f} s[/]", highlight=False)
        elif self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(stage, total=None, note="")

    def step(self, metrics: dict[str, float], total: int) -> None:
        """Called after every optimiser step."""
        if self._bar:
            note = f"step {metrics['step']}/{total}  loss {metrics['loss']:.4f}"
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=metrics["step"], total=total, note=note)

    def note(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False, markup=False)

    def reward_model(self, metrics: dict[str, float]) -> None:
        self.note(
            f"reward model: {metrics.get('num_pairs', metrics.get('num_prompts'))} "
            f"{'pairs' if 'num_pairs' in metrics else 'prompts'}, held-out accuracy "
            f"{metrics['held_out_accuracy']:.2f}"
        )

    def summary(self, rows: list[dict[str, Any]]) -> None:
        """The table of iterations, iteration 0 being the model that they start from."""
        self._stop_bar()
        table = Table(title="Held-out prompts")
        names = {
            "iteration": "iteration",
            "gold": "gold",
            "reward": "reward",
            "win_rate": "win rate vs start",
            "kl": "KL (nats)",
            "length_tokens": "tokens",
            "finished_share": "finished",
        }
        names = {k: v for k, v in names.items() if any(row.get(k) is not None for row in rows)}
        for title in names.values():
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(*(_cell(row.get(name)) for name in names))
        self.console.print(table)
        for row in rows:
            for warning in row.get("warnings", []):
                self.console.print(f"[yellow]iteration {row['iteration']}: {warning}[/]")

    def model(self, path: Path) -> None:
        """Where the trained model is, and what makes one of adapters."""
        adapters = (path / "adapter_config.json").exists()
        whole = f" (adapters; rlhf-fast merge --models {path} --output MODEL)" if adapters else ""
        self.console.print(f"model: {path}{whole}", highlight=False, markup=False, soft_wrap=True)

    def _stop_bar(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
