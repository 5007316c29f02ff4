"""DPO from hidden states, reference given: sequences of 256, half of each is prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import heads
from benchmarks.bench_linear_logps import functions
from benchmarks.heads import Problem
from rlhf_fast.ops import linear_preference_loss

BETA = 0.1
# Every contestant gets 0 as the reference's log-probs: Liger's class takes no others.


def count(p: Problem) -> int:
    """Sequences: of 256 tokens, at least 8."""
    return max(8, len(p.labels) // 256)


def without_prompts(p: Problem) -> Tensor:
    labels = p.labels.view(count(p), -1).clone()
    labels[:, : labels.shape[1] // 2] = -100
    return labels


def ours(budget: int, p: Problem) -> Tensor:
    labels = without_prompts(p)
    cu_seqlens = torch.arange(len(labels) + 1, device=labels.device) * labels.shape[1]
    zeros = torch.zeros(len(labels) // 2, device=labels.device)
    return linear_preference_loss(
        p.hidden,
        p.weight,
        labels.flatten(),
        cu_seqlens,
        zeros,
        zeros,
        beta=BETA,
        logits_budget_bytes=budget,
    ).loss


def from_logps(function):
    """DPO in plain PyTorch over a function of response rows alone."""

    def loss(p: Problem) -> Tensor:
        labels = without_prompts(p).flatten()
        live = (labels != -100).nonzero()[:, 0]
        logps = function(Problem(p.hidden[live], p.weight, labels[live]))
        chosen, rejected = logps.view(count(p) // 2, 2, -1).sum(-1).unbind(1)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def loss(p: Problem) -> Tensor:
        labels = without_prompts(p)
        halves = torch.arange(len(labels)).view(-1, 2).t().flatten()  # chosen first, then rejected
        hidden = p.hidden.view(*labels.shape, -1)[halves]
        return module(p.weight, hidden, labels[halves])[0]

    return loss


def losses() -> dict[str, object]:
    return heads.loss_contestants(ours, from_logps, functions(), ("Liger FusedLinearDPO", liger))


SWEEP, whole = heads.SWEEP, heads.whole


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    return heads.curves(lambda p: ours(0, p), sizes, dtype)


def run(args) -> None:
    heads.race_losses("linear_preference_loss", losses, args)
