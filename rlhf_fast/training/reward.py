"""Reward models from preferences: a head on frozen features, or the whole model.

Several outputs of the head make an ensemble on a shared decoder: each member learns from its own
random weighting of the pairs (Bayesian bootstrap), and the reward is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.losses.reward_model import contrastive_loss, smooth_labels
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.fit import FitOptions, fit
from rlhf_fast.training.reward_config import RewardTrainingConfig
from rlhf_fast.training.reward_head import fit_head, pair_features

Example = TypeVar("Example")
VIEW_DROPOUT = 0.05
"""Of the features in both views of a response that the contrastive term compares."""


@dataclass(frozen=True)
class RewardPair:
    """A prompt with its chosen and its rejected response, and by how much the first is better."""

    group: TokenGroup
    margin: float = 0.0
    weights: tuple[float, ...] = ()
    """What the pair counts for each member of an ensemble; none: one each."""
    target: float = 1.0
    """Probability that the first is better."""
    index: int = 0
    """Place of its label, where labels change."""


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[TokenGroup],
    *,
    config: RewardTrainingConfig,
    seed: int,
    margins: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> dict[str, float]:
    """Minimises `ops.reward_model_loss`; a group is (chosen, rejected).

    Pairs of one prompt stay together in training or hold-out. Returns pair accuracies. `targets`
    are probabilities that the first response is better.
    Source: arXiv 2405.07863, section 2.1; the margin is that of arXiv 2307.09288, equation 2.
    """
    margins = [0.0] * len(pairs) if margins is None else margins
    targets = [1.0] * len(pairs) if targets is None else targets
    rows = zip(pairs, margins, targets, strict=True)
    examples = [RewardPair(group, margin, target=target) for group, margin, target in rows]
    train, held_out = hold_out(examples, config.holdout_share)
    if not train:
        raise UserError("no preference pair is left to train the reward model on")
    groups = [pair.group for pair in (*train, *held_out)]
    if config.parameters == "head":
        if model.num_outputs > 1:
            raise UserError(
                f"parameters head fits one output, got {model.num_outputs}; use parameters all"
            )
        features = pair_features(model, groups)
        fit_head(
            model,
            features[: len(train)],
            [pair.margin for pair in train],
            [pair.target for pair in train],
            weight_decay=config.head_weight_decay,
            label_smoothing=config.label_smoothing,
        )
        difference = (features[:, 0] - features[:, 1]) @ model.head.weight[0].double()
    else:
        fit_them = _fit_adapters if config.members == "adapters" else _fit_all
        fit_them(model, train, config, seed, on_step, options)
        rewards = torch.tensor(model.map_responses(groups, model.rewards), dtype=torch.float32)
        difference = rewards[:, 0] - rewards[:, 1]
    correct = (difference > 0).double()
    return {
        "num_pairs": len(train),
        "num_held_out_pairs": len(held_out),
        "accuracy": correct[: len(train)].mean().item(),
        "held_out_accuracy": correct[len(train) :].mean().item(),  # NaN without held-out pairs
    }


def _prompt_ids(example: Any) -> tuple[int, ...]:
    return tuple(example.group.prompt_ids)


def hold_out(
    examples: Sequence[Example],
    share: float,
    prompt_of: Callable[[Example], Hashable] = _prompt_ids,
) -> tuple[list[Example], list[Example]]:
    """To train on, and the last share of the prompts, each with all its examples."""
    prompts = list(dict.fromkeys(map(prompt_of, examples)))
    held = set(prompts[len(prompts) - int(len(prompts) * share) :])
    train = [example for example in examples if prompt_of(example) not in held]
    return train, [example for example in examples if prompt_of(example) in held]


def _fit_all(
    model: RewardModel,
    pairs: Sequence[RewardPair],
    config: RewardTrainingConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None],
    options: FitOptions | None,
) -> None:
    num_members = model.head.out_features
    if num_members > 1:
        pairs = _bootstrap(pairs, num_members, seed)
    updates, labels = config.label_update_rate > 0, [pair.target for pair in pairs]
    if updates:
        several = options and options.accelerator and options.accelerator.num_processes > 1
        if several or (options and options.checkpoints):
            raise UserError(
                "label_update_rate: the labels are those of one process, and not in checkpoints; "
                "train without"
            )

    is_soft = updates or any(label < 1 for label in labels)
    pairs = [replace(pair, index=i) for i, pair in enumerate(pairs)]

    def each(values: list[float]) -> Tensor:
        """One value per pair and member."""
        return model.floats(values).repeat_interleave(num_members)

    def loss(
        part: Sequence[RewardPair], batch: Sequence[RewardPair]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        tokens, metrics = model.collate([pair.group for pair in part]), {}
        if config.contrastive_weight:
            features = model.features(tokens)
            views = [F.dropout(features, VIEW_DROPOUT) for _ in range(2)]
            metrics["contrastive_loss"] = contrastive_loss(*views) * len(part)
            outputs = model.read(features)
        else:
            outputs = model.outputs(tokens)
        chosen, rejected = outputs.view(len(part), 2, num_members).unbind(1)  # [P, members]
        losses = ops.reward_model_loss(
            chosen.flatten(),
            rejected.flatten(),
            margins=each([pair.margin for pair in part]),
            targets=each([labels[p.index] for p in part]) if is_soft else None,
            label_smoothing=config.label_smoothing,
            center_weight=config.center_coefficient,
            reduction="none",
        ).loss.view(len(part), num_members)
        if part[0].weights:
            losses = losses * model.floats([p.weights for p in part])
        rewards = model.combine(outputs.detach()).view(-1, 2)
        metrics |= {
            "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).float().sum(),
            "reward_margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            "reward": rewards.mean(1).sum(),
        }
        if updates:
            old = model.floats([labels[p.index] for p in part])
            new = smooth_labels(old, *rewards.unbind(1), rate=config.label_update_rate)
            for pair, label in zip(part, new.tolist()):
                labels[pair.index] = label
        total = losses.mean(1).sum()
        if config.contrastive_weight:
            total = total + config.contrastive_weight * metrics["contrastive_loss"]
        return total / len(batch), {name: sum_ / len(batch) for name, sum_ in metrics.items()}

    fit(
        model,
        pairs,
        loss,
        sizes=[model.num_tokens(pair.group) for pair in pairs],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
    )


def _fit_adapters(
    model: RewardModel,
    pairs: Sequence[RewardPair],
    config: RewardTrainingConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None],
    options: FitOptions | None,
) -> None:
    """One member after the other, from the same decoder."""
    if options and (options.checkpoints or options.accelerator):
        raise UserError("members adapters are trained by one process, without checkpoints")
    names = []
    weighted = _bootstrap(pairs, config.num_outputs, seed)
    for k in range(config.num_outputs):
        own = derive_seed(seed, "member", k)
        names.append(model.add_member(k + 1, config.adapter, seed=own))
        mine = [replace(pair, weights=pair.weights[k : k + 1]) for pair in weighted]
        _fit_all(model, mine, config, own, on_step, options)
    model.become_ensemble(names)


def _bootstrap(pairs: Sequence[RewardPair], num_members: int, seed: int) -> list[RewardPair]:
    """Exponential weights, mean 1: each member sees a random re-weighting of the data."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap"))
    weights = torch.empty(len(pairs), num_members, dtype=torch.float32).exponential_(
        generator=generator
    )
    return [replace(pair, weights=tuple(row)) for pair, row in zip(pairs, weights.tolist())]
