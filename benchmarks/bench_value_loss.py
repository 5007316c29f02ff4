"""The clipped loss of a value model: forward with backward, and the clip fraction."""

from __future__ import annotations

import torch

from benchmarks import harness, one_pass, peers
from rlhf_fast.ops import value_loss, value_loss_ref

CLIP = 0.2


def eager(values, old_values, returns, mask):
    """As TRL, verl and OpenRLHF write it."""
    bounded = torch.clamp(values, old_values - CLIP, old_values + CLIP)
    square, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    with torch.no_grad():
        ((clipped > square).float() * mask).sum() / mask.sum()
    return 0.5 * (torch.max(square, clipped) * mask).sum() / mask.sum()


def run(args) -> None:
    values, old_values, returns = torch.randn(3, args.batch, args.length)
    mask = torch.arange(args.length) < torch.randint(1, args.length + 1, (args.batch, 1))

    def ours(values, old_values, returns, _):
        return value_loss(values, returns, old_values=old_values, clip=CLIP, mask=mask).loss

    functions = {"rlhf_fast": ours, "eager": eager, "torch.compile": torch.compile(eager)}
    functions |= peers.value_losses(CLIP)
    truth = values.double().requires_grad_()
    value_loss_ref(truth, returns.double(), old_values=old_values.double(), clip=CLIP, mask=mask)[
        0
    ].backward()

    def runner(function):
        leaf, as_float = values.clone().requires_grad_(), mask.float()

        def both():
            leaf.grad = None
            function(leaf, old_values, returns, as_float).backward()
            return leaf.grad

        return both

    def check(run) -> float:
        error = (run().double() - truth.grad).square().mean().sqrt() * mask.sum()
        assert error < 1e-4, f"off by {error}"
        return error.item()

    contestants = {name: runner(function) for name, function in functions.items()}
    limits = one_pass.limits(values, old_values, returns)
    harness.race("value_loss", "forward+backward", contestants, check, args, limits)
