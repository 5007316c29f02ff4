"""Contests of losses over a few numbers per sequence: loss, metrics and gradient in one timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.floors import measure
from benchmarks.harness import Contestant


@dataclass
class Contest:
    title: str
    leaves: list[Tensor]
    """Inputs that get a gradient; contestants are called with these."""
    truth: Callable[..., Tensor]
    """Loss of float64 leaves."""
    contestants: dict[str, Callable[..., Tensor]]
    num_bytes: int
    """Read and written at least, forward and backward."""


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in leaves]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def error_of(function, truth: list[Tensor], leaves: list[Tensor]) -> float:
    """RMS error of the gradients against float64; raises where one is wrong."""
    got = gradients(function, leaves)
    for name, x, want in zip(("loss", *("gradient",) * len(leaves)), got, truth):
        worst = (x.double() - want).abs().max() / want.abs().max().clamp(min=1e-12)
        assert worst < 1e-3, f"{name} is off by {worst:.1e} of the largest"
    errors = torch.cat([(x.double() - y).flatten() for x, y in zip(got[1:], truth[1:])])
    return errors.square().mean().sqrt().item()


def run(stem: str, contests: list[Contest], args) -> None:
    floors = measure(torch.get_num_threads())
    rows = []
    for contest in contests:
        truth = gradients(contest.truth, [x.double() for x in contest.leaves])
        wanted = harness.chosen(contest.contestants, args)
        errors = harness.checked(wanted, lambda f, c=contest, t=truth: error_of(f, t, c.leaves))
        entries = [
            Contestant(name, lambda f=f, c=contest: gradients(f, c.leaves))
            for name, f in wanted.items()
            if name in errors
        ]
        times = harness.time_all(entries, 300, args.seconds)
        group = [
            {
                **harness.describe(),
                "kind": contest.title,
                "batch": args.batch,
                "length": args.length,
                "contestant": name,
                **harness.quantiles(times[name]),
                "floor_ms": round(contest.num_bytes / floors.update_gb_s / 1e6, 6),
                "rms_error": errors[name],
            }
            for name in times
        ]
        harness.print_table(f"{stem}: {contest.title}, forward+backward", group)
        rows += group
    if args.save:
        print("saved to", harness.record(stem, rows))
