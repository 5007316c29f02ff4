"""AdamW, its schedule, the order of the data, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from rlhf_fast.errors import UserError
from rlhf_fast.training.online_merging import OnlineMergingConfig


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
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    ema_decay: float = 0.0
    """Above 0, the result is the exponential moving average of the weights with this decay."""
    merging: OnlineMergingConfig = field(default_factory=OnlineMergingConfig)
    """Merges every step with what supervised fine-tuning changed."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_epochs", "batch_size", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that want a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("no parameter of the model wants a gradient: nothing can be trained")
    coarse = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.half]
    if coarse:
        raise UserError(
            f"trained weights must be float32 or bfloat16, got float16 ({coarse[0]}), in which "
            f"Adam's squares vanish; load the model with dtype=torch.float32"
        )
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if config.weight_decay:
        kinds = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        decays = config.weight_decay, 0.0
        groups = [{"params": p, "weight_decay": w} for p, w in zip(kinds, decays) if p]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0, fused=True)


def allocate_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Makes AdamW's state of these before the first step.

    Made during that step it would lie between gradients, and what these leave when they are freed
    would be holes too small for the activations of the next step.
    """
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Learning rate of step 0, 1, ...; warm-up counts the first step as 1 / warmup_steps."""
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    else:
        progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[config.schedule]
    return config.learning_rate * factor


def data_order(num_examples: int, config: OptimizerConfig, seed: int) -> list[list[int]]:
    """The examples of every step; a function of its arguments, so a step is a position to resume.

    An epoch's last batch may be smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(config.num_epochs):
        order = torch.randperm(num_examples, generator=generator).tolist()
        batches += [
            order[i : i + config.batch_size] for i in range(0, num_examples, config.batch_size)
        ]
    return batches


class WeightAverage:
    """Exponential moving average of parameters, kept in float32.

    Until enough steps are seen the decay is (1 + step) / (10 + step), so the initial weights do
    not dominate a short run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = list(parameters)
        self.values = [p.detach().to(torch.float32, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Makes the average the model's weights."""
        for parameter, value in zip(self.parameters, self.values):
            parameter.copy_(value)
