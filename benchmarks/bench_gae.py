"""Advantages and returns of a batch of sequences, against the loops that trainers run."""

from __future__ import annotations

import torch

from benchmarks import harness, peers
from benchmarks.floors import measure
from rlhf_fast.ops import gae, gae_ref

GAMMA, LAM = 0.99, 0.95


def eager(rewards, values, mask):
    """The loop over time of TRL's PPO and of cleanrl."""
    rewards, values = rewards * mask, values * mask
    advantage, columns = 0, []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def ours(rewards, values, mask):
    return gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask)


def functions() -> dict[str, object]:
    """Contestants by name; each maps (rewards, values, mask) to (advantages, returns)."""
    return {"rlhf_fast": ours, "eager loop": eager, **peers.gaes(GAMMA, LAM)}


SWEEP = ("batch", "length")


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    rewards, values = torch.randn(2, sizes["batch"], sizes["length"], dtype=dtype)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return {
        "rlhf_fast": lambda: ours(rewards, values, mask),
        "eager loop": lambda: eager(rewards, values, mask),
    }


def run(args) -> None:
    floors = measure(torch.get_num_threads())
    shape = (args.batch, args.length)
    rewards, values = torch.randn(2, *shape)
    # Right padding, which every peer treats alike.
    lengths = torch.randint(args.length // 2, args.length + 1, (args.batch, 1))
    mask = torch.arange(args.length) < lengths
    truth = gae_ref(rewards.double(), values.double(), gamma=GAMMA, lam=LAM, mask=mask)

    def runner(function):
        m = mask if function is ours else mask.float()
        return lambda: function(rewards, values, m)

    def check(run) -> float:
        error = (run()[1].double() - truth.returns)[mask].square().mean().sqrt().item()
        assert error < 1e-4, f"off by {error}"
        return error

    contestants = {name: runner(function) for name, function in functions().items()}
    num_bytes = rewards.numel() * 17  # rewards, values and mask in, advantages and returns out
    floor = num_bytes / floors.update_gb_s / 1e6
    harness.race("gae", "forward", contestants, check, args, floor)
