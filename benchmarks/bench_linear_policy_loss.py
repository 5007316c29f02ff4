"""PPO from hidden states, on policy: sequences of 256, half of each is prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import heads
from benchmarks.bench_linear_logps import functions
from benchmarks.bench_linear_preference_loss import count, without_prompts
from benchmarks.heads import Problem
from rlhf_fast.ops import linear_policy_loss


def advantages(p: Problem) -> Tensor:
    return torch.linspace(-1.0, 1.0, count(p), device=p.labels.device)


def ours(budget: int, p: Problem) -> Tensor:
    labels = without_prompts(p)
    hidden = p.hidden.view(*labels.shape, -1)
    return linear_policy_loss(
        hidden, p.weight, labels, None, advantages(p), logits_budget_bytes=budget
    ).loss


def from_logps(function):
    """PPO in plain PyTorch over a function of response rows alone."""

    def loss(p: Problem) -> Tensor:
        labels = without_prompts(p).flatten()
        live = (labels != -100).nonzero()[:, 0]
        logps = function(Problem(p.hidden[live], p.weight, labels[live])).view(count(p), -1)
        ratio, weights = (logps - logps.detach()).exp(), advantages(p)[:, None]
        return -torch.min(ratio * weights, ratio.clamp(0.8, 1.2) * weights).mean()

    return loss


def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def loss(p: Problem) -> Tensor:
        labels = without_prompts(p)
        hidden = p.hidden.view(*labels.shape, -1)
        mask = labels != -100
        return module(hidden, p.weight, labels.clamp(min=0), mask, advantages(p))[0]

    return loss


def losses() -> dict[str, object]:
    return heads.loss_contestants(ours, from_logps, functions(), ("Liger FusedLinearGRPO", liger))


SWEEP, whole = heads.SWEEP, heads.whole


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    return heads.curves(lambda p: ours(0, p), sizes, dtype)


def run(args) -> None:
    heads.race_losses("linear_policy_loss", losses, args)
