"""A reward model's linear head alone, fitted to preference pairs on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel


@torch.no_grad()
def pair_features(model: RewardModel, pairs: Sequence[TokenGroup]) -> Tensor:
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


def fit_head(
    model: RewardModel,
    features: Tensor,
    margins: list[float],
    targets: list[float],
    *,
    weight_decay: float,
    label_smoothing: float,
) -> None:
    """Logistic regression on feature differences, in float64 to convergence."""
    # Scaling to unit variance makes the penalty mean the same for every backbone.
    scale = features.flatten(0, 1).std(0).clamp_min(1e-6)
    difference = (features[:, 0] - features[:, 1]) / scale
    weight = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    zero = difference.new_zeros(len(margins))
    shift, labels = (torch.tensor(values, dtype=torch.float64) for values in (margins, targets))
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        pairs = ops.reward_model_loss_ref(
            difference @ weight,
            zero,
            margins=shift,
            targets=labels,
            label_smoothing=label_smoothing,
        )
        loss = pairs.loss + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        model.head.weight.copy_((weight / scale)[None])
