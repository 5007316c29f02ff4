"""A DPO or reward-model step against TRL's trainers: time, peak memory, and where ours goes.

Every contestant is a process of its own, so peaks are its own; steps are interleaved, so a busy
moment hits all. The losses of all steps must agree before a time is printed. CPU seconds are given
beside wall time: on a shared machine they are the steadier of the two.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import harness
from benchmarks.training_contestants import Settings, available
from rlhf_fast.process import bound_spinning

TOLERANCE = 2e-3
"""Relative difference of losses in float32."""

ROUNDING = 1.5
"""In bfloat16 an update is below the weights' last bit, so trajectories part within a few steps,
TRL's from TRL's own with another allocator too: ours may be this many times as far from float32's
as the farthest of the others is."""


class Contestant:
    """A child process that makes a step when asked."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        module: str = "benchmarks.training_contestants",
        tuned: bool = False,
    ) -> None:
        self.name = name
        self.steps: list[dict[str, float]] = []
        env = {k: v for k, v in os.environ.items() if k not in harness.TUNED_MALLOC}
        if tuned or "tuned" in name:
            env |= harness.TUNED_MALLOC
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        bound_spinning(env)  # of all alike: their idle threads share the cores
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, name, json.dumps(vars(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def step(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # its answer will say that it has ended
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        self.steps.append(self._answer())

    def finish(self) -> dict:
        """Peak memory in bytes, and what the parts of a step take."""
        self.process.stdin.close()
        answer = self._answer()
        self.process.wait()
        return answer

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        code = self.process.wait()
        why = "; the system kills what memory is short for, see --pairs and --only" * (code == -9)
        raise SystemExit(f"{self.name} ended without an answer (exit {code}{why})")


def model_path(name: str) -> str:
    """A model's folder; of `smollm2` the quickstart's."""
    if name != "smollm2":
        return name
    from rlhf_fast.recipes.quickstart import model

    return model()


def run(args) -> None:
    model = model_path(args.model)
    for task, dtype, lengths in itertools.product(args.task, args.dtype, args.lengths):
        threads = args.threads[0]
        settings = Settings(task, model, dtype, lengths, args.pairs, args.steps, threads)
        rows = measure(settings, args)
        if args.save:
            print(f"written to {harness.record('training', rows)}")


def measure(settings: Settings, args) -> list[dict[str, object]]:
    names = available(settings.task)
    wanted = args.only or names
    if left_out := [name for name in names if name not in wanted]:
        print(f"--only leaves out {', '.join(left_out)}")
    contestants = [Contestant(name, settings) for name in names if name in wanted]
    for _ in range(settings.num_steps):
        for contestant in contestants:
            contestant.step()
    ends = {contestant.name: contestant.finish() for contestant in contestants}
    ours = next((c for c in contestants if c.name == "rlhf_fast"), contestants[0])
    if settings.dtype == "float32":
        for contestant in contestants:
            check_losses(ours, contestant)
    else:
        check_rounding(ours, contestants, float32_losses(settings))
    what = f"{settings.task} step, {settings.num_pairs} pairs of {settings.lengths}"
    how = f"{settings.dtype}, {settings.threads} thread(s)"
    print(f"\n{what}, {how}; losses agree over {settings.num_steps} steps")
    print(f"  {'contestant':26} {'wall ms':>9} {'CPU ms':>9} {'x ours':>7} {'peak MiB':>9}")
    rows = []
    for contestant in contestants:
        row = summary(contestant, settings, ends[contestant.name]["peak_bytes"])
        rows.append(row | {"left_out": ",".join(left_out)})
        ratio = row["cpu_ms"] / summary(ours, settings, 0)["cpu_ms"]
        print(
            f"  {contestant.name:26} {row['median_ms']:9.1f} {row['cpu_ms']:9.1f} {ratio:7.2f} "
            f"{row['peak_bytes'] / 2**20:9.0f}"
        )
    first = ours.steps[0]["cpu_ms"] - summary(ours, settings, 0)["cpu_ms"]
    print(f"  our first step took {first:.1f} CPU ms more: warming up and, for dpo, the reference")
    if parts := ends[ours.name].get("parts"):
        text = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        print(f"  our parts, each alone, CPU ms: {text}")
    return rows


def check_losses(ours: Contestant, other: Contestant) -> None:
    for number, (mine, theirs) in enumerate(zip(ours.steps, other.steps), 1):
        difference = abs(mine["loss"] - theirs["loss"])
        if difference > TOLERANCE * max(abs(theirs["loss"]), 0.1):
            raise SystemExit(
                f"step {number}: loss {mine['loss']} but {other.name} has {theirs['loss']}; "
                f"times of different computations are not compared"
            )


def float32_losses(settings: Settings) -> list[float]:
    truth = Contestant("rlhf_fast", replace(settings, dtype="float32"))
    for _ in range(settings.num_steps):
        truth.step()
    truth.finish()
    return [step["loss"] for step in truth.steps]


def check_rounding(ours: Contestant, contestants: list[Contestant], truth: list[float]) -> None:
    """No farther from float32's losses than ROUNDING times the farthest of the others."""

    def distance(contestant: Contestant) -> float:
        return math.dist([step["loss"] for step in contestant.steps], truth) / math.hypot(*truth)

    distances = {contestant.name: distance(contestant) for contestant in contestants}
    listed = ", ".join(f"{name} {value:.1e}" for name, value in distances.items())
    print(f"\nlosses' distance from float32: {listed}")
    others = [value for name, value in distances.items() if name != ours.name]
    if others and distances[ours.name] > max(TOLERANCE, ROUNDING * max(others)):
        raise SystemExit("ours is the farthest; times of different computations are not compared")


def summary(contestant: Contestant, settings: Settings, peak: int) -> dict[str, object]:
    """Medians; the first step warms up and computes what is computed once."""
    steps = contestant.steps[1:] or contestant.steps
    return {
        **harness.describe(),
        "kind": settings.task,
        "threads": settings.threads,
        "malloc": "own",  # each its own: ours and those named tuned keep what they free
        "dtype": settings.dtype,
        "lengths": settings.lengths,
        "pairs": settings.num_pairs,
        "model": Path(settings.model).name,
        "contestant": contestant.name,
        **harness.quantiles([s["wall_ms"] for s in steps]),
        "cpu_ms": round(statistics.median(s["cpu_ms"] for s in steps), 2),
        "first_cpu_ms": round(contestant.steps[0]["cpu_ms"], 2),
        "last_loss": contestant.steps[-1]["loss"],
        "peak_bytes": peak,
    }
