"""Bradley-Terry reward models: a head on frozen features, or the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit


@dataclass(frozen=True)
class RewardTrainingConfig:
    """Training of a Bradley-Terry reward model."""

    parameters: Literal["head", "all"] = "all"
    """`all` fine-tunes the whole model; `head` fits a linear head on frozen features."""
    head_weight_decay: float = 0.1
    """L2 penalty on the head (of features scaled to unit variance) when only it is trained."""
    holdout_share: float = 0.1
    """Share of the prompts kept to measure pair accuracy."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-6, batch_size=512, weight_decay=1e-3
        )
    )
    """Optimiser when the whole model is trained."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_share < 1:
            raise UserError(f"reward holdout_share must be in [0, 1), got {self.holdout_share}")


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[TokenGroup],
    *,
    config: RewardTrainingConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> dict[str, float]:
    """Minimises `-log sigmoid(r_chosen - r_rejected)`; each group is (chosen, rejected).

    Pairs of one prompt stay together in training or hold-out. Returns pair accuracies.
    Source: arXiv 2405.07863, section 2.1.
    """
    train, held_out = _split(pairs, config.holdout_share)
    if not train:
        raise UserError("no preference pair is left to train the reward model on")
    if config.parameters == "head":
        features = _features(model, [*train, *held_out])
        _fit_head(model, features[: len(train)], config.head_weight_decay)
        margin = (features[:, 0] - features[:, 1]) @ model.head.weight[0].double()
    else:
        _fit_all(model, train, config, seed, on_step, options)
        rewards = torch.tensor(model.map_responses([*train, *held_out], model.rewards))
        margin = rewards[:, 0] - rewards[:, 1]
    correct = (margin > 0).double()
    return {
        "num_pairs": len(train),
        "num_held_out_pairs": len(held_out),
        "accuracy": correct[: len(train)].mean().item(),
        "held_out_accuracy": correct[len(train) :].mean().item(),  # NaN without held-out pairs
    }


def _split(
    pairs: Sequence[TokenGroup], holdout_share: float
) -> tuple[list[TokenGroup], list[TokenGroup]]:
    prompts = list(dict.fromkeys(tuple(p.prompt_ids) for p in pairs))
    held = set(prompts[len(prompts) - int(len(prompts) * holdout_share) :])
    train = [p for p in pairs if tuple(p.prompt_ids) not in held]
    return train, [p for p in pairs if tuple(p.prompt_ids) in held]


@torch.no_grad()
def _features(model: RewardModel, pairs: Sequence[TokenGroup]) -> Tensor:
    """[P, 2, D] float64; a response that occurs in several pairs is computed once."""
    places: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for pair in pairs:
        responses = places.setdefault(tuple(pair.prompt_ids), {})
        for response in pair.responses:
            responses.setdefault(tuple(response), len(responses))
    groups = [TokenGroup(list(p), [list(r) for r in places[p]]) for p in places]
    values = dict(zip(places, model.map_responses(groups, model.features)))

    def rows(pair: TokenGroup) -> list[list[float]]:
        prompt = tuple(pair.prompt_ids)
        return [values[prompt][places[prompt][tuple(response)]] for response in pair.responses]

    return torch.tensor([rows(pair) for pair in pairs], dtype=torch.float64)


def _fit_head(model: RewardModel, features: Tensor, weight_decay: float) -> None:
    """Logistic regression on feature differences, in float64 to convergence."""
    # Scaling to unit variance makes the penalty mean the same for every backbone.
    scale = features.flatten(0, 1).std(0).clamp_min(1e-6)
    difference = (features[:, 0] - features[:, 1]) / scale
    weight = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * weight_decay * weight.square().sum()
        loss = -F.logsigmoid(difference @ weight).mean() + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        model.head.weight.copy_((weight / scale)[None])


def _fit_all(
    model: RewardModel,
    pairs: Sequence[TokenGroup],
    config: RewardTrainingConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None],
    options: FitOptions | None,
) -> None:
    def loss(
        part: Sequence[TokenGroup], batch: Sequence[TokenGroup]
    ) -> tuple[Tensor, dict[str, float]]:
        chosen, rejected = model.rewards(model.collate(part)).view(-1, 2).unbind(1)
        margin = chosen - rejected
        accuracy = (margin > 0).sum().item() / len(batch)
        return -F.logsigmoid(margin).sum() / len(batch), {"reward_accuracy": accuracy}

    fit(
        model,
        pairs,
        loss,
        sizes=[model.num_tokens(group) for group in pairs],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
    )
