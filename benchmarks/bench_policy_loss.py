"""Policy losses of a batch: forward with backward, and the metrics that trainers log."""

from __future__ import annotations

import torch

from benchmarks import harness, one_pass, peers
from rlhf_fast.ops import policy_loss, policy_loss_ref

EPSILON = 0.2


def mean(x, mask):
    return (x * mask).sum() / mask.sum()


def eager_ppo(logps, old_logps, advantages, mask):
    """As TRL, verl and OpenRLHF write it, with clip fraction and KL."""
    ratio = torch.exp(logps - old_logps)
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages
    loss = -torch.min(ratio * advantages, clipped)
    with torch.no_grad():
        mean(-(logps - old_logps), mask)
        mean((clipped < ratio * advantages).float(), mask)
        mean(ratio, mask)
    return mean(loss, mask)


def eager_gspo(logps, old_logps, advantages, mask):
    lengths = mask.sum(1).clamp(min=1)
    ratio = torch.exp(((logps - old_logps) * mask).sum(1) / lengths)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages
    with torch.no_grad():
        mean(-(logps - old_logps), mask)
        (clipped < ratio * advantages).float().mean()
    return -torch.min(ratio * advantages, clipped).mean()


def run(args) -> None:
    torch.manual_seed(0)
    logps = -3 * torch.rand(args.batch, args.length)
    old_logps = logps + 0.1 * torch.randn_like(logps)
    advantages = torch.randn(args.batch)
    lengths = torch.randint(args.length // 2, args.length + 1, (args.batch, 1))
    mask = torch.arange(args.length) < lengths
    limits = one_pass.limits(logps, old_logps)
    theirs = {
        "ppo": {
            "eager": eager_ppo,
            "torch.compile": torch.compile(eager_ppo),
            **peers.policy_losses(EPSILON),
        },
        "gspo": {"eager": eager_gspo, "torch.compile": torch.compile(eager_gspo)},
    }
    for loss_type, functions in theirs.items():

        def ours(lp, old, advantages, _, loss_type=loss_type):
            return policy_loss(lp, old, advantages, mask=mask, loss_type=loss_type).loss

        truth = logps.double().requires_grad_()
        inputs = (truth, old_logps.double(), advantages.double())
        policy_loss_ref(*inputs, mask=mask, loss_type=loss_type)[0].backward()

        def check(run, truth=truth) -> float:
            error = (run().double() - truth.grad).square().mean().sqrt() * mask.sum()
            assert error < 1e-4, f"off by {error}"
            return error.item()

        contestants = {
            name: runner(function, logps, old_logps, advantages, mask)
            for name, function in {"rlhf_fast": ours, **functions}.items()
        }
        kind = f"{loss_type} forward+backward"
        harness.race("policy_loss", kind, contestants, check, args, limits)


def runner(function, logps, old_logps, advantages, mask):
    leaf, as_float = logps.clone().requires_grad_(), mask.float()

    def both():
        leaf.grad = None
        function(leaf, old_logps, advantages, as_float).backward()
        return leaf.grad

    return both
