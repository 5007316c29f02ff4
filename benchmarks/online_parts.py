"""What the two sides of the benchmark `online` share: settings, files, a clock."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

BETA, LEARNING_RATE = 0.1, 1e-5
SEED = 0


@dataclass
class Settings:
    model: str
    reward_model: str
    folder: str
    """prompts.jsonl, and what the contestants hand to each other."""
    generations: int
    new_tokens: int
    temperature: float
    batch: int
    """Pairs per optimiser step; the rival also scores this many responses at a time."""
    micro_batch: int
    """Pairs that the rival computes at a time."""
    micro_batch_tokens: int
    """Tokens that ours computes at a time: about as many."""
    epochs: int

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def iteration(self, number: int, who: str) -> Path:
        path = self.path / f"iteration_{number}" / who
        path.mkdir(parents=True, exist_ok=True)
        return path

    def prompts(self) -> list:
        from rlhf_fast.types import prompt_from_json

        return [prompt_from_json(row) for row in read(self.path / "prompts.jsonl")]

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))

    def latest(self, number: int) -> str:
        """The rival's policy before an iteration."""
        return str(self.iteration(number - 1, "rival") / "policy") if number > 1 else self.model


class Clock:
    """Seconds by the name of what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def answer(self, **facts: object) -> None:
        print("@" + json.dumps({"seconds": dict(self.seconds), **facts}), flush=True)
        self.seconds.clear()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
