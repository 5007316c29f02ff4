"""One value per response token, computed without gradient and kept as lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import GroupBatch, TokenGroup

TokenValues = list[list[float]]
"""Per response of a group, one value per token."""


def token_values(
    backbone: Backbone, groups: Sequence[TokenGroup], function: Callable[[GroupBatch], Tensor]
) -> list[TokenValues]:
    """Applies `function` ([M] values of a batch's response tokens) to all groups, in order."""
    results: dict[int, TokenValues] = {}
    for part, values in backbone.map_batches(groups, function):
        for i in part:
            results[i] = []
            for response in groups[i].responses:
                results[i].append(values[: len(response)])
                values = values[len(response) :]
    return [results[i] for i in range(len(groups))]


def packed(values: Sequence[TokenValues], device: torch.device | str = "cpu") -> Tensor:
    """All tokens of all responses of all groups, one after another: (N,) float32."""
    flat = [v for group in values for response in group for v in response]
    return torch.tensor(flat, dtype=torch.float32, device=device)


def offsets(groups: Sequence[TokenGroup], device: torch.device | str = "cpu") -> Tensor:
    """(S + 1,) where each response of the packed tokens begins, and the end."""
    lengths = [len(response) for group in groups for response in group.responses]
    return torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)


def unpacked(values: Tensor, groups: Sequence[TokenGroup]) -> list[TokenValues]:
    """The inverse of `packed`."""
    flat, at, result = values.tolist(), 0, []
    for group in groups:
        result.append([])
        for response in group.responses:
            result[-1].append(flat[at : at + len(response)])
            at += len(response)
    return result
