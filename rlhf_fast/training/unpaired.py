"""Training of a policy on responses labelled desirable or not: KTO and its relatives."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.ops.preference_inputs import TRAITS
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit
from rlhf_fast.training.reference import reference_logps

UNPAIRED_LOSSES = tuple(name for name, traits in TRAITS.items() if "unpaired" in traits)


@dataclass(frozen=True)
class UnpairedConfig:
    """KTO, or another loss of single responses that are labelled desirable or not."""

    loss_type: Literal[UNPAIRED_LOSSES] = "kto"  # type: ignore
    """The loss; formulas and sources are in csrc/math/preference.h. kto compares a response's
    log-ratio with the KL to the reference, estimated in every step from the batch's prompts
    followed by responses to other prompts; bco_pair with the mean log-ratio of the batch."""
    beta: float = 0.1
    """Strength of the tie to the reference model."""
    desirable_weight: float = 1.0
    """Of desirable responses (KTO's lambda_D)."""
    undesirable_weight: float = 1.0
    """Of undesirable ones (KTO's lambda_U)."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6, batch_size=64)
    )
    """Optimiser; its batches count prompts, each with all its responses."""

    def __post_init__(self) -> None:
        if self.loss_type not in UNPAIRED_LOSSES:
            raise UserError(
                f"unpaired.loss_type must be one of {', '.join(UNPAIRED_LOSSES)}, "
                f"got {self.loss_type!r}"
            )
        if self.beta <= 0 or self.desirable_weight < 0 or self.undesirable_weight < 0:
            raise UserError(
                f"unpaired: beta must be > 0, desirable_weight and undesirable_weight >= 0, got "
                f"{self.beta}, {self.desirable_weight} and {self.undesirable_weight}"
            )


@dataclass(frozen=True)
class ScoredUnpairedConfig(UnpairedConfig):
    """The same of responses whose rewards tell which of them are desirable."""

    min_reward: float | None = None
    """Smallest reward of a desirable response; None: those above the mean of their prompt's are
    desirable, and prompts whose responses all have the same reward are left out."""

    def labels(self, rewards: Sequence[float]) -> list[bool]:
        """Which of a prompt's responses are desirable; none where they are not told apart."""
        if self.min_reward is not None:
            return [reward >= self.min_reward for reward in rewards]
        mean, differ = statistics.fmean(rewards), max(rewards) > min(rewards)
        return [reward > mean for reward in rewards] if differ else []


@dataclass(frozen=True)
class _Example:
    group: TokenGroup
    labels: list[bool]
    baseline: TokenGroup | None  # whose log-ratios tell what is neutral
    # Computed anew they differ by rounding, so they tell no data apart.
    ref_logps: list[float] = field(repr=False)
    baseline_ref_logps: list[float] | None = field(repr=False)


def train_unpaired(
    policy: LanguageModel,
    groups: Sequence[TokenGroup],
    labels: Sequence[list[bool]],
    *,
    config: UnpairedConfig,
    seed: int,
    reference: LanguageModel | None = None,
    reference_cache: Path | None = None,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> list[dict[str, float]]:
    """Trains on responses of which `labels` says whether they are desirable; returns metrics per
    step.

    The loss is the mean over a batch's responses. `reference` as in `train_preference`. The KL of
    kto is taken over the whole batch, whatever its split into micro-batches and processes.

    Source: KTO, arXiv 2402.01306, equations 7 and 8; BCO, arXiv 2404.04656, whose running mean of
    rewards is here the batch's.
    """
    options = options or FitOptions()
    params = ops.PreferenceParams(
        chosen_weight=config.desirable_weight, rejected_weight=config.undesirable_weight
    )
    baselines = _baselines(groups, config.loss_type)
    ref_logps = reference_logps(
        reference or policy,
        [*groups, *baselines],
        cache=reference_cache,
        with_adapters=reference is not None and reference.model is not policy.model,
        accelerator=options.accelerator,
    )
    own, others = ref_logps[: len(groups)], ref_logps[len(groups) :]
    nothing = [None] * len(groups)
    examples = [
        _Example(*row) for row in zip(groups, labels, baselines or nothing, own, others or nothing)
    ]

    def logps_of(
        groups: Sequence[TokenGroup], ref_logps: Sequence[list[float]]
    ) -> tuple[Tensor, Tensor]:
        references = policy.floats([*itertools.chain.from_iterable(ref_logps)])
        return policy.response_logps(policy.collate(groups)), references

    def baseline(part: Sequence[_Example], batch: Sequence[_Example]) -> tuple[Tensor, dict]:
        ours, ref = logps_of([e.baseline for e in part], [e.baseline_ref_logps for e in part])
        return (ours - ref).sum() / sum(len(e.baseline_ref_logps) for e in batch), {}

    def loss(
        part: Sequence[_Example], batch: Sequence[_Example], neutral: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        logps, ref = logps_of([e.group for e in part], [e.ref_logps for e in part])
        is_desirable = torch.tensor([x for e in part for x in e.labels], device=logps.device)
        neutral = max(neutral, 0.0) if config.loss_type == "kto" else neutral
        result = ops.unpaired_preference_loss(
            logps,
            is_desirable,
            ref,
            loss_type=config.loss_type,
            beta=config.beta,
            params=params,
            data=ops.PairData(baseline=policy.floats(neutral) if baselines else None),
            reduction="sum",
        )
        count = sum(len(e.labels) for e in batch)
        metrics = _metrics(result, is_desirable, batch)
        if baselines:
            metrics["baseline"] = neutral * len(logps) / count
        return result.loss / count, metrics

    return fit(
        policy,
        examples,
        loss,
        sizes=[
            max(policy.num_tokens(group) for group in (e.group, e.baseline) if group)
            for e in examples
        ],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
        measure=baseline if baselines else None,
    )


def _baselines(groups: Sequence[TokenGroup], loss_type: str) -> Sequence[TokenGroup]:
    """For every group one whose mean log-ratio tells what is neutral; none where nothing does."""
    if "baseline" not in TRAITS[loss_type]:
        return []
    return mismatched(groups) if loss_type == "kto" else groups


def _metrics(
    result: ops.PreferenceLossOutput, is_desirable: Tensor, batch: Sequence[_Example]
) -> dict[str, Tensor | float]:
    """This part's share of the batch's means."""
    labels = [label for example in batch for label in example.labels]
    rewards, num_desirable = result.chosen_rewards, sum(labels)
    num_others = len(labels) - num_desirable
    return {
        "reward_accuracy": result.accuracies.sum() / len(labels),
        "desirable_reward": (rewards * is_desirable).sum() / max(num_desirable, 1),
        "undesirable_reward": (rewards * ~is_desirable).sum() / max(num_others, 1),
    }


def mismatched(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The prompts followed by responses to other prompts; every group's responses are used once.

    Responses are cut so that none of these groups is longer than the longest of `groups`.
    """
    most = max(Counter(tuple(group.prompt_ids) for group in groups).values())
    if 2 * most > len(groups):
        raise UserError(
            f"kto estimates its KL from responses to other prompts: no prompt may have more than "
            f"half of the rows, got {most} of {len(groups)}; take --unpaired.loss-type apo_zero"
        )
    order = sorted(range(len(groups)), key=lambda i: groups[i].prompt_ids)
    longest = max(group.path_length for group in groups)
    result = list(groups)
    for place, i in enumerate(order):
        room = longest - len(groups[i].prompt_ids)
        other = groups[order[(place + most) % len(groups)]]
        result[i] = replace(groups[i], responses=[r[:room] for r in other.responses])
    return result
