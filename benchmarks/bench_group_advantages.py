"""Group-relative advantages of a batch of completions, 8 to a prompt in any order."""

from __future__ import annotations

from collections import defaultdict

import torch

from benchmarks import harness
from benchmarks.floors import measure
from rlhf_fast.ops import group_advantages, group_advantages_ref

EPSILON = 1e-6


def ours(rewards, ids):
    return group_advantages(rewards, group_ids=ids, epsilon=EPSILON)


def eager(rewards, ids):
    """The dictionary of verl's compute_grpo_outcome_advantage."""
    members = defaultdict(list)
    for i, group in enumerate(ids.tolist()):
        members[group].append(rewards[i])
    statistics = {}
    for group, scores in members.items():
        scores = torch.stack(scores)
        statistics[group] = scores.mean(), scores.std()
    advantages = torch.empty_like(rewards)
    for i, group in enumerate(ids.tolist()):
        mean, std = statistics[group]
        advantages[i] = (rewards[i] - mean) / (std + EPSILON)
    return advantages


def run(args) -> None:
    floors = measure(torch.get_num_threads())
    rewards = torch.randn(args.batch)
    ids = torch.randperm(args.batch) // 8
    truth = group_advantages_ref(rewards.double(), group_ids=ids, epsilon=EPSILON)

    def check(run) -> float:
        error = (run().double() - truth).square().mean().sqrt().item()
        assert error < 1e-4, f"off by {error}"
        return error

    contestants = {"rlhf_fast": lambda: ours(rewards, ids), "eager": lambda: eager(rewards, ids)}
    floor = rewards.numel() * 16 / floors.update_gb_s / 1e6
    harness.race("group_advantages", "forward", contestants, check, args, floor)
