"""DPO from hidden states, reference given: 8 sequences in 4 pairs, half of each is prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import heads
from benchmarks.bench_linear_logps import functions
from benchmarks.heads import Problem
from rlhf_fast.ops import linear_preference_loss

SEQUENCES = 8
BETA = 0.1
# Every contestant gets 0 as the reference's log-probs: Liger's class takes no others.


def without_prompts(p: Problem) -> Tensor:
    labels = p.labels.view(SEQUENCES, -1).clone()
    labels[:, : labels.shape[1] // 2] = -100
    return labels


def ours(budget: int, p: Problem) -> Tensor:
    labels = without_prompts(p)
    cu_seqlens = torch.arange(SEQUENCES + 1, device=labels.device) * labels.shape[1]
    zeros = torch.zeros(SEQUENCES // 2, device=labels.device)
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
        chosen, rejected = logps.view(SEQUENCES // 2, 2, -1).sum(-1).unbind(1)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def loss(p: Problem) -> Tensor:
        labels = without_prompts(p)
        halves = torch.arange(SEQUENCES).view(-1, 2).t().flatten()  # chosen first, then rejected
        hidden = p.hidden.view(*labels.shape, -1)[halves]
        return module(p.weight, hidden, labels[halves])[0]

    return loss


def losses() -> dict[str, object]:
    return heads.loss_contestants(ours, from_logps, functions(), ("Liger FusedLinearDPO", liger))


def run(args) -> None:
    heads.race_losses("linear_preference_loss", losses, args)
