"""Masked whitening of a batch of advantages."""

from __future__ import annotations

import torch

from benchmarks import harness
from benchmarks.floors import measure
from rlhf_fast.ops import whiten, whiten_ref


def eager(values, mask):
    """As verl and OpenRLHF write it."""
    mask = mask.float()
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / (count - 1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def run(args) -> None:
    floors = measure(torch.get_num_threads())
    values = torch.randn(args.batch, args.length)
    mask = torch.arange(args.length) < torch.randint(1, args.length + 1, (args.batch, 1))
    truth = whiten_ref(values.double(), mask)

    def check(run) -> float:
        error = (run().double() - truth).square().mean().sqrt().item()
        assert error < 1e-5, f"off by {error}"
        return error

    contestants = {"rlhf_fast": lambda: whiten(values, mask), "eager": lambda: eager(values, mask)}
    floor = values.numel() * (5 / floors.read_gb_s + 9 / floors.update_gb_s) / 1e6
    harness.race("whiten", "forward", contestants, check, args, floor)
