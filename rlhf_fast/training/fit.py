"""The optimiser loop that SFT, reward models and preference training share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.checkpoints import Checkpoints, fingerprint
from rlhf_fast.training.engine import make_engine
from rlhf_fast.training.online_merging import OnlineMerging
from rlhf_fast.training.optimizer import (
    OptimizerConfig,
    WeightAverage,
    allocate_moments,
    data_order,
    learning_rate,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FitOptions", "LossFunction", "OptimizerConfig", "fit"]

Example = TypeVar("Example")
LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor | float]]]
"""(micro-batch, whole batch) -> (its part of the batch's mean loss, its part of each metric)."""


@dataclass(frozen=True)
class FitOptions:
    """How a fit is run; nothing here changes what is learned."""

    checkpoints: Checkpoints | None = None
    """Saves the state now and then, and starts from the last one saved."""
    accelerator: Accelerator | None = None
    """Shares the work with the other processes of the launch."""


def fit(
    backbone: Backbone,
    examples: Sequence[Example],
    loss: LossFunction,
    *,
    sizes: Sequence[int],
    config: OptimizerConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
    measure: LossFunction | None = None,
) -> list[dict[str, float]]:
    """Minimises the mean loss over `examples`; returns one row of metrics per optimiser step.

    `sizes` are the examples' lengths in tokens: a batch is split into micro-batches of at most
    `backbone.micro_batch_tokens` padded tokens, and since `loss` normalises by the whole batch
    the split changes nothing but memory. The data order depends on `seed` alone. `measure` tells a
    number of the whole batch, as `loss` does but without gradient, before each step; `loss` gets it
    as its third argument.
    """
    options = options or FitOptions()
    engine = make_engine(backbone, config, options.accelerator)
    allocate_moments(engine.optimizer, engine.parameters)
    average = WeightAverage(engine.parameters, config.ema_decay) if config.ema_decay else None
    batches = data_order(len(examples), config, seed)
    merges = config.merging.rule is not None
    merging = OnlineMerging(backbone.model, config.merging, seed) if merges else None
    checkpoints, rows = options.checkpoints, []
    run = fingerprint(config, seed, examples) if checkpoints else ""
    with _randomness(derive_seed(seed, "dropout", engine.rank), backbone.device):
        if checkpoints:
            rows = checkpoints.restore(engine, average, run)
        backbone.model.train()
        for step in range(len(rows), len(batches)):
            batch = batches[step]
            whole = [examples[i] for i in batch]
            batch_sizes = [sizes[i] for i in batch]

            def of(function: LossFunction, *known: float, whole: Sequence[Example] = whole):
                return lambda part: function([whole[i] for i in part], whole, *known)

            known = [engine.measure(batch_sizes, of(measure))] if measure else []
            metrics = engine.accumulate(batch_sizes, of(loss, *known))
            norm = engine.clip(config.max_grad_norm)
            if not math.isfinite(norm):
                raise UserError(
                    f"the gradient norm is {norm} at step {step + 1}: lower the learning rate "
                    f"({config.learning_rate}) or check the data; nothing was updated in this step"
                )
            row = {"step": step + 1, **metrics, "grad_norm": norm}
            row["learning_rate"] = learning_rate(step, len(batches), config)
            row["num_tokens"] = sum(batch_sizes)
            with merging.merged(step) if merging else contextlib.nullcontext():
                engine.step(row["learning_rate"])
            if average:
                average.update(step)
            rows.append(row)
            on_step(row, len(batches))
            if checkpoints and (step + 1) % checkpoints.every_steps == 0:
                checkpoints.save(engine, average, rows, run)
    if average:
        average.apply()
    engine.finish()
    backbone.model.eval()
    return rows


@contextlib.contextmanager
def _randomness(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn inside, as the dropout of adapters, depends on `seed` alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
