"""Runs benchmarks one after the other, each in processes of its own, and sums them up."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import harness, processes, report_data, report_tables
from benchmarks.plan import Plan
from benchmarks.report_data import Row

KEPT = processes.ROOT / "build" / "benchmarks"
"""Rows of every run, and which stems are done at which revision."""

QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}


@dataclass
class Ended:
    stem: str
    how: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Contestants that could not be timed, and why."""

    @property
    def is_good(self) -> bool:
        return self.how.startswith(processes.DONE) and not self.failures

    def __str__(self) -> str:
        names = ", ".join(failure.split(":")[0] for failure in self.failures)
        return f"{self.stem}: {self.how}{f' without {names}' if names else ''}"


def run(chosen: dict[str, Plan], rest: list[str], parse: Callable, minutes: float) -> bool:
    """Benchmarks as planned, `rest` being the user's options; whether all went well."""
    print(f"{harness.device_name()}; absent: {', '.join(harness.absent()) or 'nobody'}")
    planned = sum(plan.minutes for plan in chosen.values())
    if len(chosen) > 1:
        order = ", ".join(f"{stem} {plan.minutes:g}" for stem, plan in chosen.items())
        limit = f"; stops after {minutes:g}" if minutes < math.inf else ""
        print(f"in this order, minutes expected: {order}; {planned:g} in all{limit}")
    begin, ended = time.monotonic(), []
    for number, (stem, plan) in enumerate(chosen.items(), 1):
        elapsed = time.monotonic() - begin
        if len(chosen) > 1:
            print(f"\n######## {number} of {len(chosen)}: {stem}, {clock(elapsed)} elapsed")
        arguments = [stem, *plan.options, *rest]
        ended.append(run_stem(stem, parse(arguments), arguments, rest, 60 * minutes - elapsed))
    if len(chosen) > 1:
        print_summary(ended, time.monotonic() - begin)
    for end in ended:
        for failure in end.failures:
            print(f"{end.stem}, {failure}")
    bad = [str(end) for end in ended if not end.is_good]
    if bad:
        print(f"not all well: {'; '.join(bad)}")
    return not bad


def run_stem(
    stem: str, args: Namespace, arguments: list[str], rest: list[str], left_s: float
) -> Ended:
    """All settings of malloc and threads, which are best set when a process starts."""
    done = KEPT / f"{stem}.done"
    command = harness.shown_command(["python -m benchmarks", stem, *rest])
    state = f"{harness.commit()} {command.replace(' --resume', '')}"
    if args.resume and done.exists() and done.read_text() == state:
        return Ended(stem, f"{processes.DONE} before")
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = Path(tempfile.mkdtemp(prefix=time.strftime(f"{stem}-%m%d-%H%M%S-"), dir=KEPT))
    begin, end = time.monotonic(), Ended(stem, processes.DONE)
    for malloc, threads in settings(args):
        print(f"\n==== {stem}, malloc {malloc}, {threads} thread(s)", flush=True)
        chosen = ["--malloc", malloc, "--threads", str(threads)]
        env = os.environ | QUIET | {harness.COMMAND_VARIABLE: command}
        env["OMP_NUM_THREADS"] = str(threads)
        env |= harness.TUNED_MALLOC if malloc == "tuned" else {}
        if args.sweep is None:
            chosen.append("--save")
            env[harness.RESULTS_VARIABLE] = str(kept)
        left = left_s - (time.monotonic() - begin)
        child = [sys.executable, "-m", "benchmarks", *arguments, *chosen]
        how = processes.run(child, min(left, 1e6), env) if left > 5 else "no time left"
        end.how = end.how if how == processes.DONE else how
    end.seconds = time.monotonic() - begin
    for path in kept.glob("*.csv"):
        end.rows = report_data.load(path)
        if args.save:
            print("added to", harness.append(harness.RESULTS / path.name, end.rows))
    end.failures = harness.failures(kept)
    if end.is_good:
        done.write_text(state)
    return end


def settings(args: Namespace) -> Iterator[tuple[str, int]]:
    return ((malloc, threads) for malloc in args.malloc for threads in args.threads)


def print_summary(ended: list[Ended], seconds: float) -> None:
    print(f"\n######## summary, {clock(seconds)}")
    for end in ended:
        print(f"{end.stem:24} {clock(end.seconds):>8}  {end.how}")
    found = report_data.headlines([row for end in ended for row in end.rows])
    if found:
        print(f"\n{'':60} {'ours, ms':>9} {'other, ms':>10}  faster")
    for contest in found:
        ours, rival = (report_data.median(row) for row in (contest.ours, contest.rival))
        title = f"{contest.name}: {contest.sizes}"
        print(f"{title[:60]:60} {ours:9.3g} {rival:10.3g}  {contest.gain:.2f}x", end="")
        print(f" {contest.rival['contestant']}")
    if found:
        print(f"\n{report_tables.tally(found)}")


def clock(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
