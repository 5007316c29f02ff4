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

    def _all(self) -> list[Path]:
        found = [p for p in self.directory.glob("step_*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def save(self, engine: Engine, average: WeightAverage | None, rows: Rows, run: str) -> None:
        """Writes the state after `len(rows)` steps; all processes must call it."""
        tensors = {
            "weights.safetensors": _weights(engine),
            "optimizer.safetensors": _moments(engine),
            "average.safetensors": _average(engine, average),
        }
        tensors = {name: _whole(values) for name, values in tensors.items()}
        state = {"step": len(rows), "run": run, "rng": _gather(_rng_state(), engine)}

        def fill(directory: Path) -> None:
            for name, values in tensors.items():
                save_file(values, directory / name)
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
            tensors = {p.name: load_file(p) for p in path.glob("*.safetensors")}
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: damaged checkpoint ({error}); remove it") from error
        if state["run"] != run:
            raise UserError(
                f"{path} was written by a run with other data or settings; "
                f"give another directory or remove it"
            )
        _copy_into(_weights(engine), tensors["weights.safetensors"])
        _load_moments(engine, tensors["optimizer.safetensors"])
        _copy_into(_average(engine, average), tensors["average.safetensors"])
        _set_rng_state(state["rng"][engine.rank])
        return rows


def fingerprint(config: OptimizerConfig, seed: int, sizes: Iterable[int]) -> str:
    """Names a fit by what decides its course, as far as that is known without the model."""
    text = json.dumps([asdict(config), seed, list(sizes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _names(engine: Engine) -> dict[int, str]:
    named = engine.backbone.model.named_parameters()
    return {id(parameter): name for name, parameter in named if parameter.requires_grad}


def _weights(engine: Engine) -> dict[str, Tensor]:
    named = engine.backbone.model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def _moments(engine: Engine) -> dict[str, Tensor]:
    names = _names(engine)
    return {
        f"{names[id(parameter)]}|{key}": value
        for parameter, state in engine.optimizer.state.items()
        for key, value in state.items()
    }


def _load_moments(engine: Engine, saved: dict[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        parameter, _, key = name.rpartition("|")
        states.setdefault(parameter, {})[key] = value
    names = _names(engine)
    for parameter in engine.parameters:
        # load_state_dict would cast and index by number; this keeps names and dtypes.
        engine.optimizer.state[parameter] = {
            key: value if value.dim() == 0 else _like(parameter, value)
            for key, value in states[names[id(parameter)]].items()
        }


def _average(engine: Engine, average: WeightAverage | None) -> dict[str, Tensor]:
    if average is None:
        return {}
    names = _names(engine)
    return {names[id(p)]: value for p, value in zip(average.parameters, average.values)}


@torch.no_grad()
def _copy_into(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if targets.keys() != saved.keys():
        different = sorted(targets.keys() ^ saved.keys())
        raise UserError(f"the checkpoint holds other tensors than the model: {different[:3]}")
    for name, target in targets.items():
        target.copy_(_like(target, saved[name]))


def _like(target: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `target`, and spread over processes as that is."""
    if not hasattr(target, "full_tensor"):
        return value.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gathers what is spread over processes."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).contiguous()
        for name, value in tensors.items()
    }


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "cpu": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
    }


def _set_rng_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(saved["cpu"]))
    if saved["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(text) for text in saved["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _gather(value: Any, engine: Engine) -> Sequence[Any]:
    if engine.num_processes == 1:
        return [value]
    found: list = [None] * engine.num_processes
    torch.distributed.all_gather_object(found, value)
    return found
