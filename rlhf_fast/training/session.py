"""What the stand-alone trainers share: model, processes, trackers, folder, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from rlhf_fast.errors import UserError
from rlhf_fast.io import lock, write_atomic, write_jsonl
from rlhf_fast.launch import launched_with, several_processes, start_accelerator
from rlhf_fast.memory import reuse_freed_memory
from rlhf_fast.models.adapters import merge_adapters
from rlhf_fast.models.backbone import Attention, Precision
from rlhf_fast.models.card import Card, with_card
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.rows import RowReport
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.engine_state import gathered
from rlhf_fast.training.fit import FitOptions
from rlhf_fast.training.progress import TrainingProgress
from rlhf_fast.training.zero_config import zero_config

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How models are computed, in every command; nothing here changes results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes the GPU where there is one."""
    precision: Precision = "bf16"
    """Matrix products; parameters that are trained are float32 in both."""
    micro_batch_tokens: int = 8192
    """Padded tokens computed at once; changes memory, not results."""
    attention: Attention = "dense"
    """`flex` computes packed rows on a GPU with FlexAttention block masks."""
    gradient_checkpointing: bool = False
    """Computes every layer again in backward instead of keeping its states."""

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1:
            raise UserError(f"micro_batch_tokens must be >= 1, got {self.micro_batch_tokens}")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(ComputeOptions):
    """How the model is computed; nothing here changes what is learned beyond rounding."""

    row_tokens: int = 512
    """Rows are filled with several examples up to this length; 0: one example per row."""

    def backbone_options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "device"}


@dataclass(frozen=True)
class OutputConfig:
    """The run's folder: `model/`, `metrics.jsonl`, `data.json`, `run.json`, `checkpoints/`."""

    directory: Annotated[str, tyro.conf.arg(name="output")] = ""
    """Where the run is written; a run that was interrupted there is continued."""
    checkpoint_steps: int = 0
    """Optimiser steps between two checkpoints; 0: none."""
    keep_checkpoints: int = 1
    """Checkpoints that stay on disk."""
    merge_adapters: bool = False
    """Saves the whole model with LoRA added to its weights, not the adapters alone."""
    trackers: tuple[str, ...] = ()
    """Accelerate's trackers that get the metrics: tensorboard, wandb, trackio, ..."""


@dataclass
class Session:
    """One stand-alone training run; a `with` block keeps other runs out of its folder."""

    name: str
    run: Any
    """The run's configuration, a dataclass with `output`, `compute` and `seed`."""
    report: RowReport = field(default_factory=RowReport)

    def __post_init__(self) -> None:
        output: OutputConfig = self.run.output
        if not output.directory:
            raise UserError("output.directory is missing: give --output DIRECTORY")
        self.directory = Path(output.directory)
        if self.run.compute.device == "cpu" or not torch.cuda.is_available():
            reuse_freed_memory()
        self.accelerator = _accelerator(output, self.run.compute)
        self.device = self._find_device()
        self.progress = TrainingProgress(self.name)
        self.is_main = self.accelerator is None or self.accelerator.is_main_process

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as held:
            if self.is_main:  # for all processes of a launch
                held.enter_context(lock(self.directory / "run.lock"))
            self._begin()
            self._held = held.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._held.close()

    def _begin(self) -> None:
        if (self.directory / "model").exists():
            raise UserError(f"{self.directory} holds a finished run; give another --output")
        self._check_same_run(Checkpoints(self.directory / "checkpoints"))
        if self.is_main:
            text = json.dumps(asdict(self.run), indent=2)
            write_atomic(self.directory / "run.json", text + "\n")
        if self.run.output.trackers:
            self._start_trackers(self.run.output.trackers)

    def _check_same_run(self, checkpoints: Checkpoints) -> None:
        """A checkpoint is continued by the settings that led to it, or not at all."""
        path = self.directory / "run.json"
        if checkpoints.latest() is None or not path.exists():
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        freely = {"output", "compute"}  # change no result
        changed = changed_settings(
            {key: value for key, value in before.items() if key not in freely},
            {key: value for key, value in asdict(self.run).items() if key not in freely},
        )
        if changed:
            raise UserError(
                f"{checkpoints.directory} was written by a run with other settings: "
                f"{', '.join(changed)}; give those back, or another --output"
            )

    def _start_trackers(self, names: tuple[str, ...]) -> None:
        # Accelerate leaves out in silence what is not installed.
        found = [getattr(tracker, "value", str(tracker)) for tracker in self.accelerator.log_with]
        missing = sorted(set(names) - set(found))
        if missing:
            raise UserError(f"output.trackers: {', '.join(missing)} cannot be used; install it")
        self.accelerator.init_trackers(self.name, config={"run": json.dumps(asdict(self.run))})

    def _find_device(self) -> torch.device:
        if self.accelerator is not None:
            return self.accelerator.device
        name = self.run.compute.device
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda: no CUDA device is available; use --device cpu or auto")
        return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def options(self) -> FitOptions:
        output: OutputConfig = self.run.output
        checkpoints = None
        if output.checkpoint_steps:
            checkpoints = Checkpoints(
                self.directory / "checkpoints", output.checkpoint_steps, output.keep_checkpoints
            )
        return FitOptions(checkpoints, self.accelerator)

    def on_step(self, metrics: dict[str, float], total: int) -> None:
        if self.is_main:
            self.progress.step(metrics, total)
        if self.run.output.trackers:
            self.accelerator.log(metrics, step=int(metrics["step"]))

    def announce_data(self) -> None:
        """Prints and writes what became of the rows, before any training."""
        if self.is_main:
            self.progress.console.print(f"{self.name}: {self.report}", highlight=False)
            text = json.dumps(self.report.to_json(), indent=2, ensure_ascii=False)
            write_atomic(self.directory / "data.json", text + "\n")
        if not self.report.num_kept:
            raise UserError(
                f"no example is left to train on; --lengths.* says what becomes of rows that are "
                f"too long\n{self.report}"
            )

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, float]],
        save: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes metrics and model, or what `save` writes; returns the model's directory."""
        self.progress.close()
        path = self.directory / "model"
        model = gathered(model, keep=self.is_main)
        if self.is_main:
            if self.run.output.merge_adapters:
                merge_adapters(model)
            write_jsonl(self.directory / "metrics.jsonl", rows)
            save = save or functools.partial(save_model, model=model, tokenizer=tokenizer)

            def fill(directory: Path) -> Card:
                save(directory)
                return self._card(rows)

            with_card(path, fill)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        return path

    def _card(self, rows: Sequence[dict[str, float]]) -> Card:
        run, elsewhere = self.run, {"model", "data", "reference", "compute", "output"}
        settings = {name: value for name, value in asdict(run).items() if name not in elsewhere}
        method, sources = self.name.replace(" ", "-"), {"rows": run.data}
        return Card(method, type(run).__doc__, [run.model], sources, settings, rows[-1])


def changed_settings(before: Any, after: Any, name: str = "") -> list[str]:
    """What differs between two configurations as mappings: `dpo.beta 0.1 -> 0.3`, ...

    Settings that there were not yet before had no value to change.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            change
            for key, value in before.items()
            for change in changed_settings(value, after.get(key), f"{name}.{key}" if name else key)
        ]
    same = json.dumps(before) == json.dumps(after)  # a tuple is written as a list
    return [] if same else [f"{name} {before} -> {after}"]


def weight_dtype(run: Any) -> torch.dtype:
    """Weights that are trained are float32; frozen ones may be as coarse as the products."""
    frozen = run.lora.rank and run.compute.precision == "bf16"
    return torch.bfloat16 if frozen else torch.float32


def _accelerator(output: OutputConfig, compute: ComputeConfig) -> Accelerator | None:
    """Accelerate, where it was launched for several processes or has metrics to track."""
    wants_zero = launched_with("DEEPSPEED")
    if not several_processes() and not output.trackers and not wants_zero:
        return None
    from accelerate.utils import LoggerType

    known = [kind for kind in LoggerType.list() if kind != "all"]
    if unknown := sorted(set(output.trackers) - set(known)):
        raise UserError(f"output.trackers must be among {', '.join(known)}, got {unknown[0]}")
    if wants_zero:
        zero_config()  # refuses before any work
    return start_accelerator(
        compute.device,
        log_with=list(output.trackers) or None,
        project_dir=output.directory,  # TensorBoard and others write files
    )
