"""Reward-model losses: pairs with margins and centering, and masked regression heads."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks import small_losses
from benchmarks.small_losses import Contest
from rlhf_fast.ops import (
    reward_model_loss,
    reward_model_loss_ref,
    reward_regression_loss,
    reward_regression_loss_ref,
)

HEADS = 19


def pairs(chosen, rejected, margins):
    loss = -F.logsigmoid(chosen - rejected - margins).mean()
    loss = loss + 0.01 * (chosen + rejected).square().mean()
    _ = (chosen > rejected).float().mean(), (chosen - rejected).mean()
    return loss


def heads(predictions, targets, mask):
    errors = (predictions - targets).square().masked_fill(~mask, 0.0)
    return errors.sum() / mask.sum().clamp(min=1)


def run(args) -> None:
    chosen, rejected = torch.randn(2, args.batch)
    margins = torch.rand(args.batch)
    predictions, targets = torch.randn(2, args.batch, HEADS)
    mask = torch.rand(args.batch, HEADS) < 0.5
    settings = {"margins": margins, "center_weight": 0.01}
    compiled = [torch.compile(f, dynamic=False) for f in (pairs, heads)]
    contests = [
        Contest(
            f"{args.batch} pairs",
            [chosen, rejected],
            lambda c, r: reward_model_loss_ref(c, r, **settings).loss,
            {
                "rlhf_fast": lambda c, r: reward_model_loss(c, r, **settings).loss,
                "eager": lambda c, r: pairs(c, r, margins),
                "torch.compile": lambda c, r: compiled[0](c, r, margins),
            },
            num_bytes=40 * args.batch,
        ),
        Contest(
            f"{args.batch} responses, {HEADS} heads",
            [predictions],
            lambda x: reward_regression_loss_ref(x, targets, mask=mask),
            {
                "rlhf_fast": lambda x: reward_regression_loss(x, targets, mask=mask),
                "eager": lambda x: heads(x, targets, mask),
                "torch.compile": lambda x: compiled[1](x, targets, mask),
            },
            num_bytes=13 * predictions.numel(),
        ),
    ]
    small_losses.run("reward_model_loss", contests, args)
