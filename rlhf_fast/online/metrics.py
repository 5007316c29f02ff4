"""What is reported about a set of responses, and the warnings drawn from it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

import torch

from rlhf_fast.online.rounds import round_name
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import sampled_alone
from rlhf_fast.rewards.rules import distinct_ngrams
from rlhf_fast.types import Group, PreferencePair, ScoredGroup


def response_metrics(groups: Sequence[Group]) -> dict[str, float | None]:
    """Length, ends, repetition within a response and among a prompt's, entropy where known."""
    completions = [c for group in groups for c in group]
    logps = [logp for c in completions for logp in c.sampling_logps or ()]
    return {
        "length_tokens": statistics.fmean(len(c.token_ids) for c in completions),
        "finished_share": statistics.fmean(c.finished for c in completions),
        "distinct_2": statistics.fmean(distinct_ngrams(c.text, 2) for c in completions),
        "duplicate_rate": statistics.fmean(1 - len({c.text for c in g}) / len(g) for g in groups),
        "entropy": -statistics.fmean(logps) if logps else None,
    }


def reward_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean reward and its spread within a prompt (population standard deviation)."""
    return {
        "train_reward": statistics.fmean(r for group in scored for r in group.rewards),
        "reward_spread": statistics.fmean(statistics.pstdev(group.rewards) for group in scored),
    }


UPDATE_STAGES = ("reference", "trained", "policy")
"""With a moving reference and with extrapolation the update is more than one stage."""


def training_metrics(
    run: RunFolder,
    name: str,
    scored: Sequence[ScoredGroup],
    selected: Sequence[PreferencePair] | Sequence[ScoredGroup],
) -> dict[str, float | None]:
    """Rewards of the iteration's samples, means over its optimiser steps, seconds per stage."""
    steps = run.training_rows(name)
    keys = [key for key in steps[0] if key not in ("step", "learning_rate")] if steps else []
    means = {key: statistics.fmean(step[key] for step in steps) for key in keys}
    seconds = {
        "seconds_generate": _seconds_of_rounds(run, f"{name}/completions"),
        "seconds_score": _seconds_of_rounds(run, f"{name}/scored"),
        "seconds_update": _sum_known(run.seconds(f"{name}/{stage}") for stage in UPDATE_STAGES),
    }
    sampled_groups = [sampled_alone(group) for group in scored]
    sampled = response_metrics([group.completions for group in sampled_groups])
    shown = ("duplicate_rate", "entropy", "finished_share", "length_tokens")
    ours = {f"train_{key}": sampled[key] for key in shown}
    return {
        **reward_metrics(sampled_groups),
        **ours,
        **_counts(scored, selected),
        **means,
        **seconds,
    }


def _seconds_of_rounds(run: RunFolder, stage: str) -> float | None:
    times = (run.seconds(round_name(stage, number)) for number in itertools.count(1))
    return _sum_known(itertools.takewhile(lambda seconds: seconds is not None, times))


def _sum_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _counts(scored: Sequence[ScoredGroup], selected: Sequence) -> dict[str, int]:
    ties = sum(max(group.rewards) == min(group.rewards) for group in scored)
    if selected and isinstance(selected[0], PreferencePair):
        return {"num_pairs": len(selected), "num_ties": ties}
    return {"num_responses": sum(len(g.completions) for g in selected), "num_ties": ties}


def length_correlation(scored: Sequence[ScoredGroup]) -> float:
    """Correlation of reward and length within prompts; 0 where one of them does not vary."""
    lengths, rewards = [], []
    for group in scored:
        sizes = [len(c.token_ids) for c in group.completions]
        lengths += [size - statistics.fmean(sizes) for size in sizes]
        rewards += [reward - statistics.fmean(group.rewards) for reward in group.rewards]
    norm = math.sqrt(sum(x * x for x in lengths) * sum(y * y for y in rewards))
    return sum(x * y for x, y in zip(lengths, rewards)) / norm if norm > 0 else 0.0


def mean_component(scored: Sequence[ScoredGroup], name: str) -> float:
    return statistics.fmean(value for group in scored for value in group.components[name])


def mean_reward(scored: Sequence[ScoredGroup]) -> float:
    return statistics.fmean(r for group in scored for r in group.rewards)


def win_rate(ours: Sequence[ScoredGroup], theirs: Sequence[ScoredGroup]) -> tuple[float, float]:
    """Share of (our response, their response) pairs of a prompt that ours wins; a tie is half.

    Every response of a prompt meets every response of the other side. Returns the rate and its
    standard error over prompts, which are the independent units.
    """
    rates = []
    for a, b in zip(ours, theirs):
        wins = [(x > y) + 0.5 * (x == y) for x in a.rewards for y in b.rewards]
        rates.append(statistics.fmean(wins))
    return mean_and_error(rates)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; NaN for that of a single value."""
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), stderr


def length_controlled_win_rate(ours: Sequence[ScoredGroup], theirs: Sequence[ScoredGroup]) -> float:
    """The win rate at equal length: a logistic regression on the difference in tokens.

    Each meeting's outcome is modelled as `sigmoid(a + b * tanh(difference / deviation))`; returned
    is `sigmoid(a)`. As in length-controlled AlpacaEval (arXiv 2404.04475), without its term for the
    difficulty of each instruction.
    """
    differences, outcomes = [], []
    for a, b in zip(ours, theirs):
        for c, x in zip(a.completions, a.rewards):
            for d, y in zip(b.completions, b.rewards):
                differences.append(float(len(c.token_ids) - len(d.token_ids)))
                outcomes.append((x > y) + 0.5 * (x == y))
    deviation = statistics.pstdev(differences) or 1.0
    features = [math.tanh(d / deviation) for d in differences]
    constant, slope = _logistic_fit(features, outcomes)
    return 1 / (1 + math.exp(-constant))


def _logistic_fit(features: Sequence[float], outcomes: Sequence[float]) -> tuple[float, float]:
    """(constant, slope) by Newton's method; a small ridge keeps separable outcomes finite."""
    x = torch.tensor([[1.0, f] for f in features], dtype=torch.float64)
    y = torch.tensor(outcomes, dtype=torch.float64)
    weight, ridge = torch.zeros(2, dtype=torch.float64), 1e-4 * torch.eye(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ weight)
        gradient = x.T @ (p - y) / len(y) + ridge @ weight
        hessian = (x.T * (p * (1 - p))) @ x / len(y) + ridge
        weight = weight - torch.linalg.solve(hessian, gradient)
    return weight[0].item(), weight[1].item()


def best_of_n(scored: Sequence[ScoredGroup]) -> list[float]:
    """Expected reward of the best of n responses, for n = 1 .. K: exact, no resampling.

    `E[max] = sum_i C(i - 1, n - 1) / C(K, n) * r_(i)` over the ascending rewards r_(i).
    """
    count = min(len(group.rewards) for group in scored)
    curves = []
    for group in scored:
        ascending, total = sorted(group.rewards), len(group.rewards)
        curves.append(
            [
                sum(math.comb(i, n - 1) * r for i, r in enumerate(ascending)) / math.comb(total, n)
                for n in range(1, count + 1)
            ]
        )
    return [statistics.fmean(values) for values in zip(*curves)]


def pair_accuracy(scored: Sequence[ScoredGroup]) -> float:
    """Share of groups (chosen, rejected) whose chosen response has the higher reward."""
    return statistics.fmean(group.rewards[0] > group.rewards[1] for group in scored)


def overoptimisation_warnings(rows: Sequence[dict]) -> list[str]:
    """Signs that the policy exploits the reward model, from this row and the earlier ones."""
    if len(rows) < 2:
        return []
    before, now = rows[-2], rows[-1]
    warnings = []
    if now.get("gold") is not None:
        hacked = [r for r in rows[:-1] if now["reward"] > r["reward"] and now["gold"] < r["gold"]]
        if hacked:
            best = max(hacked, key=lambda r: r["gold"])
            warnings.append(
                f"over-optimisation since iteration {best['iteration']}: the reward rose "
                f"({best['reward']:.3f} -> {now['reward']:.3f}) while the held-out judge fell "
                f"({best['gold']:.3f} -> {now['gold']:.3f})"
            )
    if now["finished_share"] < before["finished_share"] - 0.1:
        warnings.append(
            f"fewer responses end by themselves: {before['finished_share']:.2f} -> "
            f"{now['finished_share']:.2f}"
        )
    if now["distinct_2"] < before["distinct_2"] - 0.1:
        warnings.append(
            f"responses repeat themselves: distinct bigrams {before['distinct_2']:.2f} -> "
            f"{now['distinct_2']:.2f}"
        )
    return warnings
