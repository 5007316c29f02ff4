"""Inputs of the workflow tests, and the user functions that their runs name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_fast.online.progress import Progress
from rlhf_fast.online.workflow import resume, run_online

RESPONSES = ["w21 w22 .", "w23 !", "w24 w25 w26 ."]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_rows(count: int = 12) -> list[dict]:
    return [{"prompt": f"w{30 + i} w{60 + i}", "target": 20 + i} for i in range(count)]


def demonstration_rows() -> list[dict]:
    return [{"prompt": f"w{90 + i}", "response": RESPONSES[i % len(RESPONSES)]} for i in range(6)]


def pair_rows() -> list[dict]:
    return [
        {"prompt": f"w{200 + i}", "chosen": "w21 w22 .", "rejected": f"w{300 + i} w23"}
        for i in range(20)
    ]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_without_times(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in rows]


class Killed(BaseException):
    """Not an Exception: nothing in the package may catch it."""


class KillAt(Progress):
    """Ends the run when a stage starts, or when it has computed but not yet written."""

    def __init__(self, stage: str, when: str) -> None:
        super().__init__(Console(quiet=True))
        self.stage = stage
        self.at_start = when == "start"

    def announce(self, stage: str, seconds: float | None) -> None:
        if stage == self.stage and (seconds is None) == self.at_start:
            raise Killed


def kill_and_resume(config, stage: str, when: str) -> list[dict]:
    """Metrics of a run that dies at the stage and is continued."""
    with pytest.raises(Killed):
        run_online(config, KillAt(stage, when))
    resume(Path(config.output_dir))
    return rows_without_times(Path(config.output_dir))


def shorter_is_better(prompts, completions, finished, target, **_):
    assert len(prompts) == len(completions) == len(finished) == len(target)
    return [-float(len(text)) for text in completions]


def killed_in_iteration_2(prompts, completions, **_):
    """Kills its own process, once, while iteration 2 is scored."""
    marker = Path(os.environ["KILL_MARKER"])
    calls = int(marker.read_text()) if marker.exists() else 0
    marker.write_text(str(calls + 1))
    if calls == int(os.environ["KILL_CALL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return [-float(len(text)) for text in completions]


def interrupted(completions, **_):
    """Ctrl-C, or SIGNAL, while the first responses are scored, unless told that it came already."""
    if "INTERRUPTED" not in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" leaves it ignored
        os.kill(os.getpid(), signal.Signals[os.environ.get("SIGNAL", "SIGINT")])
    return [-float(len(text)) for text in completions]


def never_killed(prompts, completions, **_):
    return [-float(len(text)) for text in completions]


def raises(**_):
    raise ValueError("no such judge")


def returns_nan(completions, **_):
    return [float("nan")] * len(completions)


def returns_too_few(completions, **_):
    return [1.0]


def constant(completions, **_):
    return [1.0] * len(completions)


def even_length(completions, **_):
    return [float(len(text) % 2 == 0) for text in completions]


def gate(prompt):
    return [1.0 + len(prompt.messages)]


def varied(completions, **_):
    """Differs between almost any two responses."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def steps(completions, **_):
    return [
        [len(word) % 3 / 3 + (ord(word[-1]) % 7) / 7 for word in c.split()] for c in completions
    ]


def odd_tokens(completion_ids, **_):
    return [[float(token % 2) for token in ids] for ids in completion_ids]


def varied_for_some(completions, target, **_):
    """Tells the responses to every other prompt apart."""
    return [v * (t % 2) for v, t in zip(varied(completions), target)]
