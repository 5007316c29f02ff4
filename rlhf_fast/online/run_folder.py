"""A run on disk: every stage is a file or directory that is complete or absent.

    config.yaml  manifest.json  metrics.jsonl  report.html
    sft/model  sft/training.jsonl
    reward_model/model  reward_model/metrics.json
    iteration_K/completions.jsonl  scored.jsonl  pairs.jsonl  training.jsonl  policy/
    iteration_K/evaluation.jsonl  reward_pairs.jsonl  reward_model/
    judge_answers.jsonl

Continuing a run recomputes what is absent and reads what is there; since every stage has a seed
of its own, the result is the one an uninterrupted run gives.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

import rlhf_fast
from rlhf_fast.errors import UserError
from rlhf_fast.io import (
    PARTIAL,
    check_writable,
    lock,
    read_jsonl,
    read_records,
    write_atomic,
    write_jsonl,
)
from rlhf_fast.launch import Launch
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.config_file import config_from_yaml, config_to_yaml
from rlhf_fast.timing import processor_name
from rlhf_fast.training.session import changed_settings
from rlhf_fast.types import to_json

Value = TypeVar("Value")
FORMAT_VERSION = 1
CHECKPOINTS = ("policy", "reference", "trained", "critic", "token_credit", "reward_model")
"""Models of an iteration."""


class RunFolder:
    """Stages of one run; `announce(stage, seconds)` is told of each start (None) and end.

    In a launch of several processes all of them compute a stage, and the main one writes it.

    A `with` block keeps other processes out of the folder, and tells how to go on when it ends by
    an interruption or by an error of the user's.
    """

    def __init__(
        self,
        path: Path,
        announce: Callable[[str, float | None], None] = lambda name, s: None,
        launch: Launch | None = None,
    ) -> None:
        self.path = path
        self.announce = announce
        self.launch = launch or Launch()
        self._is_new = False

    def __enter__(self) -> RunFolder:
        self._held = contextlib.ExitStack()
        self.launch.on_main(self._hold)
        return self

    def _hold(self) -> None:
        self._held.enter_context(lock(self.path / "config.yaml"))

    def __exit__(self, kind, error, traceback) -> None:
        self._held.close()
        command = f"`rlhf-fast resume {self.path}`"
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"; go on with {command}") from error
        if kind is UserError and (self.path / "config.yaml").exists():
            said = str(error).replace("`rlhf-fast resume RUN`", command)  # the rooms know no run
            more = "" if command in said else f"; finished stages are kept: go on with {command}"
            raise UserError(said + more) from error

    @classmethod
    def create(
        cls, config: OnlineConfig, rows_left_out: Sequence[str] = (), **options
    ) -> RunFolder:
        run = cls(Path(config.output_dir), **options)
        run.launch.on_main(lambda: run._begin(config, rows_left_out))
        return run

    def _begin(self, config: OnlineConfig, rows_left_out: Sequence[str]) -> None:
        path, text = self.path, config_to_yaml(config)
        self._is_new = not path.exists()
        check_writable(path / "config.yaml")
        with _one_at_a_time(path):
            if _finished_files(path):
                raise UserError(
                    f"output_dir {path} is not empty: choose another --output-dir, or continue "
                    f"that run with `rlhf-fast resume {path}`"
                )
            write_atomic(path / "config.yaml", text)
        facts = {"settings": asdict(config), "rows_left_out": rows_left_out, "stages": []}
        self._write_manifest(_machine() | facts)

    @classmethod
    def open(cls, path: Path, **options) -> tuple[RunFolder, OnlineConfig]:
        run = cls(path, **options)
        return run, run.launch.on_main(run._read)

    def _read(self) -> OnlineConfig:
        path = self.path
        if not (path / "manifest.json").is_file():
            if _finished_files(path) != ["config.yaml"]:
                raise UserError(f"{path} is not a run folder: it has no manifest.json")
            self._write_manifest({**_machine(), "stages": []})  # killed before its first stage
        made_by = self.manifest()
        if made_by["version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: run folder version {made_by['version']}, this is {FORMAT_VERSION}"
            )
        try:
            return config_from_yaml(path / "config.yaml", OnlineConfig())
        except UserError as error:
            raise UserError(
                f"{error}; the run was made by rlhf_fast {made_by['rlhf_fast']} and this is "
                f"{rlhf_fast.__version__}, where settings may have other names: correct the line "
                f"in {path / 'config.yaml'} (`rlhf-fast online --help` lists the settings), or "
                f"continue with that version"
            ) from error

    def changes(self, config: OnlineConfig) -> list[str]:
        """What differs between the settings that the run began with and these."""
        return changed_settings(self.manifest().get("settings", asdict(config)), asdict(config))

    def remove_if_unused(self) -> None:
        """So that a run refused before its first stage can be started again, corrected."""
        names = ("config.yaml", "manifest.json")
        if self.launch.is_main and sorted(_finished_files(self.path)) == sorted(names):
            for name in names:
                (self.path / name).unlink()
            with contextlib.suppress(OSError):  # of a killed process something may be left
                if self._is_new:
                    self.path.rmdir()

    def manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore it") from error
        if not isinstance(manifest, dict) or not manifest.keys() >= {"version", "stages"}:
            raise UserError(f"{path} must hold `version` and `stages`; restore it")
        return manifest

    def records(
        self,
        name: str,
        from_json: Callable[[Any], Value],
        compute: Callable[[], list[Value]] | None = None,
    ) -> list[Value]:
        """The rows of `name`.jsonl, computed if the file is absent."""
        path = self.path / f"{name}.jsonl"
        if self.launch.on_main(path.exists):
            return self.launch.on_main(lambda: self._kept(name, path, from_json))
        if compute is None:
            raise UserError(f"no such file: {path}")
        values = self.timed(name, compute)
        return self.launch.on_main(lambda: self._write_records(name, path, values))

    def directory(
        self, name: str, compute: Callable[[Path], None], load: Callable[[Path], Value]
    ) -> Value:
        """`load(directory)` after `compute(directory)` has made it, if it was absent."""
        path = self.path / name
        if not self.launch.on_main(path.is_dir):
            self.timed(name, lambda: compute(path))
            self.launch.gather(None)  # nobody loads what the main process has not written
        return load(path)

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return self.launch.on_main(lambda: read_jsonl(path) if path.exists() else [])

    def add_metrics(self, row: dict[str, Any]) -> None:
        rows = [*self.metrics(), row]
        self.launch.on_main(lambda: write_jsonl(self.path / "metrics.jsonl", rows))

    def training_rows(self, name: str) -> list[dict[str, float]]:
        """Metrics of each optimiser step of an iteration's update."""
        return read_jsonl(self.path / name / "training.jsonl")

    def seconds(self, name: str) -> float | None:
        """Time that the stage took when it was computed."""
        stages = {stage["name"]: stage["seconds"] for stage in self.manifest()["stages"]}
        return stages.get(name)

    def prune_policies(self, last: int, keep: int) -> None:
        """Removes all checkpoints but those of the last `keep` iterations."""
        if not self.launch.is_main:
            return
        for iteration in range(1, last - keep + 1):
            for name in CHECKPOINTS:
                shutil.rmtree(self.path / f"iteration_{iteration}" / name, ignore_errors=True)

    def timed(self, name: str, compute: Callable[[], Value]) -> Value:
        """Runs `compute` and notes its time in the manifest."""
        self.announce(name, None)
        start = time.perf_counter()
        value = compute()
        seconds = round(time.perf_counter() - start, 3)
        self._note(name, seconds=seconds, finished=_now())
        self.announce(name, seconds)
        return value

    def _note(self, name: str, **facts: Any) -> None:
        """Adds facts about a stage to the manifest."""
        if not self.launch.is_main:
            return
        manifest = self.manifest()
        known = [stage for stage in manifest["stages"] if stage["name"] == name]
        others = [stage for stage in manifest["stages"] if stage["name"] != name]
        manifest["stages"] = [*others, {"name": name, **(known[0] if known else {}), **facts}]
        self._write_manifest(manifest)

    def _kept(self, name: str, path: Path, from_json: Callable[[Any], Value]) -> list[Value]:
        self._check_unchanged(name, path)
        return read_records(path, from_json)

    def _write_records(self, name: str, path: Path, values: list[Value]) -> list[Value]:
        write_jsonl(path, map(to_json, values))
        self._note(name, sha256=_sha256(path))
        return values

    def _check_unchanged(self, name: str, path: Path) -> None:
        noted = [s.get("sha256") for s in self.manifest()["stages"] if s["name"] == name]
        if noted and noted[0] and noted[0] != _sha256(path):
            raise UserError(
                f"{path} is not what this run wrote (its checksum differs): restore it, or remove "
                f"it and what came after it to compute them again"
            )

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_atomic(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _finished_files(path: Path) -> list[str]:
    """Names in a folder but what killed processes were writing."""
    return [file.name for file in path.glob("*") if file.suffix != PARTIAL]


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Waits for other processes in the same block, where the file system has locks for folders."""
    locked = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(locked, fcntl.LOCK_EX)
        yield
    finally:
        os.close(locked)


def _machine() -> dict[str, Any]:
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "version": FORMAT_VERSION,
        "created": _now(),
        "rlhf_fast": rlhf_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "cuda" if gpu else "cpu",
        "gpu": gpu,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
