"""Losses of reward models that need more than `ops.reward_model_loss`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.ops import list_loss
from rlhf_fast.ops.native import check
from rlhf_fast.ops.sequences import check_like


def k_wise_loss(rewards: Tensor, ranks: Tensor, cu_groups: Tensor) -> Tensor:
    """Plackett-Luce loss of K responses per prompt, mean over prompts.

    rewards: [N]; ranks: [N], 0 for the best; cu_groups: [G + 1].

    Source: arXiv 2301.11270.
    """
    return list_loss(rewards, -ranks.float(), cu_groups, loss_type="plackett_luce")


def smooth_labels(
    targets: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, *, rate: float
) -> Tensor:
    """Soft labels for the next epoch: `(1 - rate) * targets + rate * sigmoid(chosen - rejected)`.

    All [B]; train with `ops.reward_model_loss(targets=...)`. Labels that the model keeps
    contradicting fade, which stops it from fitting them.

    Source: iterative data smoothing, arXiv 2401.16335, algorithm 1.
    """
    check(0 <= rate <= 1, "smooth_labels", "rate must lie in [0, 1]", rate, "0 keeps the labels")
    for name, x in (("targets", targets), ("rejected_rewards", rejected_rewards)):
        check_like("smooth_labels", name, x, chosen_rewards)
    believed = torch.sigmoid(chosen_rewards - rejected_rewards).detach()
    return torch.lerp(targets.to(believed.dtype), believed, rate)


def contrastive_loss(features: Tensor, positives: Tensor, *, temperature: float = 0.05) -> Tensor:
    """InfoNCE: each row of features should be nearest, by cosine, to its own row of positives.

    Both [B, D]: two dropout views of one response (SimCSE), or of the difference between the
    chosen and the rejected one. Mean over rows; added to a reward model's loss.

    Source: Secrets of RLHF II, arXiv 2401.06080.
    """
    op = "contrastive_loss"
    check(0 < temperature < math.inf, op, "temperature must be positive", temperature, "try 0.05")
    check_like(op, "positives", positives, features)
    similarity = F.normalize(features.float(), dim=-1) @ F.normalize(positives.float(), dim=-1).T
    rows = torch.arange(len(features), device=features.device)
    return F.cross_entropy(similarity / temperature, rows)
