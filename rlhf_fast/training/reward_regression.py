"""Reward models from scores: attributes; or quantiles, rankings or log-odds of one score."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.ops import list_loss
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit


@dataclass(frozen=True)
class RegressionConfig:
    """Training of a reward model on scores."""

    objective: Literal["attributes", "quantiles", "rankings", "binary"] = "attributes"
    """`attributes`: one output per score, squared error (a missing score is no error);
    `quantiles`: the outputs are quantiles of one score, pinball loss (arXiv 2409.10164);
    `rankings`: Plackett-Luce loss of all responses to a prompt (arXiv 2301.11270);
    `binary`: the output is the log-odds of one score in [0, 1] (arXiv 2505.14946)."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-6, batch_size=512, weight_decay=1e-3
        )
    )
    """Optimiser."""


@dataclass(frozen=True)
class ScoredResponses:
    """A prompt's responses with their scores; NaN where a score is missing."""

    group: TokenGroup
    scores: list[list[float]]  # [responses][attributes]


def train_reward_regression(
    model: RewardModel,
    examples: Sequence[ScoredResponses],
    *,
    config: RegressionConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> list[dict[str, float]]:
    """Fits the head's outputs to the scores; returns metrics per optimiser step."""
    num_outputs = model.head.out_features
    num_scores = num_outputs if config.objective == "attributes" else 1
    for example in examples:
        if any(len(row) != num_scores for row in example.scores):
            raise UserError(
                f"every response must have {num_scores} scores, got {example.scores[0]!r:.80}"
            )
        if config.objective == "binary" and any(not 0 <= s <= 1 for (s,) in example.scores):
            raise UserError(f"objective binary is of scores in [0, 1], got {example.scores!r:.80}")
    if config.objective in ("rankings", "binary") and num_outputs > 1:
        raise UserError(f"objective {config.objective} is of one output, got {num_outputs}")
    compute = {"quantiles": quantile_losses, "binary": binary_losses}.get(
        config.objective, squared_errors
    )

    def loss(
        part: Sequence[ScoredResponses], batch: Sequence[ScoredResponses]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        outputs = model.outputs(model.collate([example.group for example in part]))
        scores = model.floats([row for e in part for row in e.scores])
        if config.objective == "rankings":
            counts = torch.tensor([0, *(len(e.scores) for e in part)], device=outputs.device)
            value = k_wise_losses(outputs[:, 0], scores[:, 0], counts.cumsum(0)).sum() / len(batch)
            return value, {}
        num_responses = sum(len(example.scores) for example in batch)
        predicted = outputs.detach().sigmoid() if compute is binary_losses else outputs.detach()
        error = (predicted - scores).abs().nanmean(1).nan_to_num(0.0).sum()
        value = compute(outputs, scores).sum() / num_responses
        return value, {"absolute_error": error / num_responses}

    return fit(
        model,
        examples,
        loss,
        sizes=[model.num_tokens(example.group) for example in examples],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
    )


def accuracy(
    model: RewardModel, examples: Sequence[ScoredResponses], config: RegressionConfig
) -> float:
    """Of binary scores how many have a likelier side and are on it, else `order_accuracy`."""
    if config.objective != "binary":
        return order_accuracy(model, examples)
    found = model.map_responses([example.group for example in examples], model.rewards)
    rows = (zip(rewards, e.scores) for rewards, e in zip(found, examples))
    sides = [(reward, score - 0.5) for row in rows for reward, (score,) in row if score != 0.5]
    return mean_or_nan([float(reward * side > 0) for reward, side in sides])


def order_accuracy(model: RewardModel, examples: Sequence[ScoredResponses]) -> float:
    """How often two responses to a prompt are ordered as their scores are; NaN without pairs."""
    prompts: dict[tuple[int, ...], tuple[list[float], list[list[float]]]] = {}
    found = model.map_responses([example.group for example in examples], model.rewards)
    for example, row in zip(examples, found):
        rewards, scores = prompts.setdefault(tuple(example.group.prompt_ids), ([], []))
        rewards.extend(row)
        scores.extend(example.scores)
    return mean_or_nan(
        [x for rewards, scores in prompts.values() for x in ordered(rewards, scores)]
    )


def ordered(rewards: Sequence[float], scores: Sequence[list[float]]) -> list[float]:
    """Whether the rewards order each pair of responses as the mean of their scores does.

    Equal rewards do not order; pairs of equal or unknown scores are left out.
    """
    means = [mean_or_nan([x for x in row if x == x]) for row in scores]
    pairs = itertools.combinations(zip(rewards, means), 2)
    return [float((r - s) * (x - y) > 0) for (r, x), (s, y) in pairs if abs(x - y) > 0]


def mean_or_nan(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def k_wise_losses(rewards: Tensor, scores: Tensor, cu_groups: Tensor) -> Tensor:
    """[G] Plackett-Luce losses of the order that the scores give; as `losses.k_wise_loss`."""
    return list_loss(rewards, scores, cu_groups, loss_type="plackett_luce", reduction="none")


def squared_errors(outputs: Tensor, scores: Tensor) -> Tensor:
    """[R] mean over the attributes that are known of (output - score)^2; both inputs [R, H]."""
    known = ~scores.isnan()
    errors = torch.where(known, outputs - scores.nan_to_num(0.0), 0.0).square()
    return errors.sum(1) / known.sum(1).clamp_min(1)


def binary_losses(outputs: Tensor, scores: Tensor) -> Tensor:
    """[R] cross-entropies of log-odds with scores in [0, 1]; both [R, 1]."""
    return F.binary_cross_entropy_with_logits(outputs, scores, reduction="none")[:, 0]


def quantile_losses(outputs: Tensor, scores: Tensor) -> Tensor:
    """[R] pinball loss of H evenly spaced quantiles; outputs [R, H], scores [R, 1].

    At level t it is `t * max(score - q, 0) + (1 - t) * max(q - score, 0)`, least when q is the
    t-quantile. Source: arXiv 2409.10164.
    """
    num_quantiles = outputs.shape[1]
    levels = (torch.arange(num_quantiles, device=outputs.device) + 0.5) / num_quantiles
    gap = scores - outputs
    return (levels * F.relu(gap) + (1 - levels) * F.relu(-gap)).mean(1)
