"""Preference losses of sequence log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class PreferenceLoss(NamedTuple):
    """Per-pair loss and the implicit rewards it compares; rewards carry no gradient."""

    loss: Tensor  # [B]
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Direct preference optimisation.

    With `h = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))`:
    `-(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)`.

    All inputs are [B] sums over response tokens. Not reduced: the caller divides by its own
    normaliser, so the split into micro-batches does not matter.

    Source: arXiv 2305.18290, equation 7; label smoothing is the authors' conservative DPO.
    """
    chosen = chosen_logps - ref_chosen_logps
    rejected = rejected_logps - ref_rejected_logps
    logits = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())
