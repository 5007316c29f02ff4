"""Training of a reward model's gate on preference pairs, everything else frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.gating import Gate
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.training.optimizer import OptimizerConfig, learning_rate


@dataclass(frozen=True)
class GateConfig:
    """Training of the gate over a reward model's outputs."""

    width: int = 1024
    """Of its three hidden layers."""
    num_steps: int = 2000
    """Optimiser steps, each on a random batch."""
    batch_size: int = 1024
    """Pairs per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it decays by a cosine."""


def train_gate(
    model: RewardModel,
    pairs: Sequence[TokenGroup],
    *,
    config: GateConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
) -> Gate:
    """The gate under which chosen responses get the higher weighted sum of outputs.

    Minimises `-log sigmoid(r_chosen - r_rejected)` over a gate that sees the prompt's last hidden
    state; the model runs once over all pairs. Source: arXiv 2406.12845, section 3.2.
    """
    prompts, differences = _frozen(model, pairs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(prompts.shape[1], differences.shape[1], width=config.width)
        optimizer = torch.optim.AdamW(gate.parameters(), lr=config.learning_rate, weight_decay=0.0)
        schedule = OptimizerConfig(learning_rate=config.learning_rate, schedule="cosine")
        for step in range(config.num_steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, config.num_steps, schedule)
            rows = torch.randint(len(prompts), (min(config.batch_size, len(prompts)),))
            margin = (gate(prompts[rows]) * differences[rows]).sum(1)
            loss = ops.reward_model_loss(margin, torch.zeros_like(margin)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracy = (margin > 0).float().mean().item()
            row = {"step": step + 1, "loss": loss.item(), "reward_accuracy": accuracy}
            on_step(row, config.num_steps)
    return gate.eval().to(model.device)


@torch.no_grad()
def _frozen(model: RewardModel, pairs: Sequence[TokenGroup]) -> tuple[Tensor, Tensor]:
    """[P, D] states of the prompts, and [P, H] differences of the outputs, chosen - rejected."""
    rows = model.map_responses(pairs, lambda b: torch.cat(model.gated_inputs(b), 1))
    values = torch.tensor(rows, dtype=torch.float32)  # [P, 2, D + H]
    prompts, outputs = values.split([values.shape[2] - model.num_outputs, model.num_outputs], 2)
    return prompts[:, 0], outputs[:, 0] - outputs[:, 1]
