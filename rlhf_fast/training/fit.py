"""The optimiser loop that SFT, reward models and preference training share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone

Example = TypeVar("Example")
LossFunction = Callable[[Sequence[Any], Sequence[Any]], tuple[Tensor, dict[str, float]]]
"""(micro-batch, whole batch) -> (its part of the batch's mean loss, its part of each metric)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and its batches."""

    learning_rate: float = 5e-7
    """Peak learning rate."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 128
    """Examples per optimiser step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after warm-up, down to zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_epochs", "batch_size", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")


def fit(
    backbone: Backbone,
    examples: Sequence[Example],
    loss: LossFunction,
    *,
    sizes: Sequence[int],
    config: OptimizerConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
) -> list[dict[str, float]]:
    """Minimises the mean loss over `examples`; returns one row of metrics per optimiser step.

    `sizes` are the examples' lengths in tokens: a batch is split into micro-batches of at most
    `backbone.micro_batch_tokens` padded tokens, and since `loss` normalises by the whole batch
    the split changes nothing but memory. The data order depends on `seed` alone.
    """
    parameters = [p for p in backbone.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    batches = _batches(len(examples), config, seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _schedule(step, len(batches), config)
    )
    rows = []
    backbone.model.train()
    for step, batch in enumerate(batches, 1):
        metrics: dict[str, float] = defaultdict(float)
        for part in backbone.micro_batches([sizes[i] for i in batch]):
            value, parts = loss([examples[batch[i]] for i in part], [examples[i] for i in batch])
            value.backward()
            metrics["loss"] += value.item()
            for name, number in parts.items():
                metrics[name] += number
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient norm is {norm} at step {step}: lower the learning rate "
                f"({config.learning_rate}) or check the data; nothing was updated in this step"
            )
        row = {"step": step, **metrics, "grad_norm": norm}
        row["learning_rate"] = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append(row)
        on_step(row, len(batches))
    backbone.model.eval()
    return rows


def _batches(num_examples: int, config: OptimizerConfig, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(config.num_epochs):
        order = torch.randperm(num_examples, generator=generator).tolist()
        batches += [
            order[i : i + config.batch_size] for i in range(0, num_examples, config.batch_size)
        ]
    return batches


def _schedule(step: int, total: int, config: OptimizerConfig) -> float:
    """Factor on the learning rate; warm-up counts the first step as 1 / warmup_steps."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
