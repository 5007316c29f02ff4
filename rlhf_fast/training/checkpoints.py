"""Checkpoints inside a fit: complete or absent, and without pickle.

A checkpoint `step_N/` holds the trained weights, the optimiser's moments and the weight average as
safetensors, the metrics of all steps so far, and as JSON the position in the data, the state of the
random generators and the fingerprint of the run that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.io import read_jsonl, write_directory_atomic, write_jsonl
from rlhf_fast.training.engine import Engine
from rlhf_fast.training.optimizer import OptimizerConfig, WeightAverage

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a fit saves itself; it resumes from the last one it finds there."""

    directory: Path
    every_steps: int = 100
    keep: int = 1

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoints: {name} must be >= 1, got {getattr(self, name)}")

    def latest(self) -> Path | None:
        found = self._all()
        return found[-1] if found else None

    def rows(self) -> Rows:
        """The metrics of the steps before the last checkpoint."""
        path = self.latest()
        return read_jsonl(path / "metrics.jsonl") if path else []

    def _all(self) -> list[Path]:
        found = [p for p in self.directory.glob("step_*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def save(self, engine: Engine, average: WeightAverage | None, rows: Rows, run: str) -> None:
        """Writes the state after `len(rows)` steps; all processes must call it."""
        tensors = engine.state(average)
        state = {"step": len(rows), "run": run, "rng": _gather(_rng_state(), engine)}

        def fill(directory: Path) -> None:
            for name, values in tensors.items():
                save_file(values, directory / f"{name}.safetensors")
            write_jsonl(directory / "metrics.jsonl", rows)
            (directory / "state.json").write_text(json.dumps(state))

        if engine.rank == 0:
            write_directory_atomic(self.directory / f"step_{len(rows)}", fill)
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)
        engine.wait()

    def restore(self, engine: Engine, average: WeightAverage | None, run: str) -> Rows:
        """Puts the last checkpoint's state in place; returns the metrics of its steps."""
        path = self.latest()
        if path is None:
            return []
        try:
            state = json.loads((path / "state.json").read_text())
            rows = read_jsonl(path / "metrics.jsonl")
            tensors = {p.stem: load_file(p) for p in path.glob("*.safetensors")}
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: damaged checkpoint ({error}); remove it") from error
        if state["run"] != run:
            raise UserError(
                f"{path} was written by a run with other data or settings: give those back, or "
                f"another directory, or remove it"
            )
        engine.load_state(tensors, average)
        if len(state["rng"]) == engine.num_processes:  # else each keeps the state that it has
            _set_rng_state(state["rng"][engine.rank])
        return rows


def fingerprint(config: OptimizerConfig, seed: int, examples: Iterable[Any]) -> str:
    """Names a fit by what decides its course, as far as that is known without the model.

    What an example shows of itself is hashed, which for a dataclass is its fields with `repr`.
    """
    settings = json.dumps([asdict(config), seed], sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for example in examples:
        digest.update(f"{example!r}\n".encode())
    return digest.hexdigest()[:16]


def _rng_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():  # of this process's GPU: the next launch may have others
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: state.numpy().tobytes().hex() for device, state in states.items()}


def _set_rng_state(saved: dict[str, str]) -> None:
    torch.set_rng_state(_bytes(saved["cpu"]))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(saved["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _gather(value: Any, engine: Engine) -> Sequence[Any]:
    if engine.num_processes == 1:
        return [value]
    found: list = [None] * engine.num_processes
    torch.distributed.all_gather_object(found, value)
    return found
