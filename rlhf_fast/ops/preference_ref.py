"""The preference losses in plain PyTorch, one function each: what the kernels must compute.

`x.chosen` and `x.rejected` are scores (see csrc/math/preference.h), `x.h` is
beta * (chosen - rejected) - margin, `x.p` the probability that the chosen response really wins.
"""

from __future__ import annotations

import math
import sys
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.ops.preference_inputs import (
    DEFAULT_PARAMS,
    NO_DATA,
    TRAITS,
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
)


class Scores(NamedTuple):
    """A batch as its loss sees it; single responses are both chosen and rejected."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    margin: float | Tensor
    p: float | Tensor
    smoothing: float
    baseline: float | Tensor
    params: PreferenceParams
    is_chosen: Tensor | None

    @property
    def h(self) -> Tensor:
        return self.beta * (self.chosen - self.rejected) - self.margin


def sigmoid(x: Scores) -> Tensor:
    return -x.p * logsigmoid(x.h) - (1 - x.p) * logsigmoid(-x.h)


def robust(x: Scores) -> Tensor:
    e = x.smoothing
    return (-(1 - e) * logsigmoid(x.h) + e * logsigmoid(-x.h)) / (1 - 2 * e)


def hinge(x: Scores) -> Tensor:
    return torch.relu(1 - x.h)


def slic(x: Scores) -> Tensor:
    return torch.relu(x.margin - (x.chosen - x.rejected))


def ipo(x: Scores) -> Tensor:
    return (x.h / x.beta - (2 * x.p - 1) / (2 * x.beta)).square()


def exo_pair(x: Scores) -> Tensor:
    win, lose = torch.sigmoid(x.h), torch.sigmoid(-x.h)
    return win * (logsigmoid(x.h) - math.log1p(-x.smoothing)) + lose * (
        logsigmoid(-x.h) - math.log(x.smoothing)
    )


def discopop(x: Scores) -> Tensor:
    mix = torch.sigmoid(x.h / x.params.discopop_tau)
    blend = torch.exp(-x.h + logsigmoid(x.h / x.params.discopop_tau))
    return -(1 - mix) * logsigmoid(x.h) + blend


def dpop(x: Scores) -> Tensor:
    return -logsigmoid(x.h - x.beta * x.params.dpop_penalty * torch.relu(-x.chosen))


def cal_dpo(x: Scores) -> Tensor:
    target = 0.5 / x.beta
    calibration = (x.chosen - target).square() + (x.rejected + target).square()
    return -logsigmoid(x.chosen - x.rejected) + calibration


def apo_down(x: Scores) -> Tensor:
    return torch.sigmoid(x.beta * x.chosen) + torch.sigmoid(-x.h)


def orpo(x: Scores) -> Tensor:
    def log_odds(score: Tensor) -> Tensor:
        score = score.clamp(max=-1e-6)
        return score - torch.log(-torch.expm1(score))

    return -x.beta * logsigmoid(log_odds(x.chosen) - log_odds(x.rejected))


def sft(x: Scores) -> Tensor:
    return -x.chosen


def separable(chosen_part, rejected_part):
    """A loss that is one part for a chosen and one for a rejected response."""

    def loss(x: Scores) -> Tensor:
        chosen = x.params.chosen_weight * chosen_part(x, x.chosen)
        rejected = x.params.rejected_weight * rejected_part(x, x.rejected)
        if x.is_chosen is None:
            return chosen + rejected
        return torch.where(x.is_chosen, chosen, rejected)

    return loss


kto = separable(
    lambda x, c: torch.sigmoid(x.beta * (x.baseline - c)),
    lambda x, r: torch.sigmoid(x.beta * (r - x.baseline)),
)
bco_pair = separable(
    lambda x, c: -logsigmoid(x.beta * (c - x.baseline)),
    lambda x, r: -logsigmoid(x.beta * (x.baseline - r)),
)
apo_zero = separable(
    lambda x, c: torch.sigmoid(-x.beta * c), lambda x, r: torch.sigmoid(x.beta * r)
)
nca_pair = separable(
    lambda x, c: -logsigmoid(x.beta * c) - 0.5 * logsigmoid(-x.beta * c),
    lambda x, r: -0.5 * logsigmoid(-x.beta * r),
)
sppo_hard = separable(
    lambda x, c: (c - (x.p - 0.5) / x.beta).square(),
    lambda x, r: (r + (x.p - 0.5) / x.beta).square(),
)
sigmoid_norm = aot = aot_unpaired = cpo = simpo = bradley_terry = sigmoid
ipo_sum = ipo


def divergence_score(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(exp(log_ratio)) up to a constant, arXiv 2309.16240."""
    if divergence == "forward_kl":
        return 1 - torch.exp((-log_ratio).clamp(max=80))
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return (torch.exp(((alpha - 1) * log_ratio).clamp(max=80)) - 1) / (alpha - 1)
    return log_ratio


def preference_loss_ref(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    params: PreferenceParams = DEFAULT_PARAMS,
    data: PairData = NO_DATA,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """What `preference_loss` computes, in plain PyTorch; float64 stays float64."""
    halves = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _reference(halves, None, (loss_type, beta, params, data, reduction))


def unpaired_preference_loss_ref(
    logps: Tensor,
    is_chosen: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    params: PreferenceParams = DEFAULT_PARAMS,
    data: PairData = NO_DATA,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """What `unpaired_preference_loss` computes, in plain PyTorch; float64 stays float64."""
    halves = (logps, logps, ref_logps, ref_logps)
    return _reference(halves, is_chosen, (loss_type, beta, params, data, reduction))


def _reference(halves, is_chosen, settings) -> PreferenceLossOutput:
    loss_type, beta, params, data, reduction = settings
    traits = TRAITS[loss_type]
    dtype = torch.promote_types(halves[0].dtype, torch.float32)
    chosen, rejected, *references = (None if t is None else t.to(dtype) for t in halves)
    data = PairData(*(None if t is None else t.to(dtype) for t in data))
    lengths = [None if t is None else t.clamp(min=1) for t in data[:2]]
    if loss_type == "sft":
        lengths = [lengths[0].mean()] * 2
    details, means = _details(traits, beta, (chosen, rejected), references, lengths, is_chosen)
    nll = -chosen / lengths[0] if params.nll_weight else 0.0
    if "sorted" in traits:
        orders = sorting_orders(loss_type, chosen, rejected, *references)
        chosen, rejected, *references = (
            t[order] for t, order in zip((chosen, rejected, *references), orders)
        )
    scores = [
        _score(traits, params, *side) for side in zip((chosen, rejected), references, lengths)
    ]
    target, e = 1.0 if data.targets is None else data.targets, params.label_smoothing
    x = Scores(
        *scores,
        beta,
        params.margin + (0.0 if data.margins is None else data.margins),
        target * (1 - e) + (1 - target) * e,
        e,
        0.0 if data.baseline is None else data.baseline,
        params,
        is_chosen,
    )
    losses = getattr(sys.modules[__name__], loss_type)(x)
    if is_chosen is not None and params.nll_weight:
        nll = torch.where(is_chosen, nll, 0.0)
    losses = losses + params.nll_weight * nll
    losses = losses + params.center_weight * (scores[0] + scores[1]).square()
    if data.weights is not None:
        losses = losses * data.weights
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / max(len(losses), 1)
    return PreferenceLossOutput(loss, *details, means)


def _score(traits, params, logps, reference, lengths) -> Tensor:
    share = 1.0 / lengths if "lengths" in traits else 1.0
    if "reference" in traits:
        return share * divergence_score(logps - reference, params.f_divergence, params.alpha)
    return divergence_score(share * logps, params.f_divergence, params.alpha)


def _details(traits, beta, logps, references, lengths, is_chosen) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if "reference" in traits:
            chosen, rejected = (beta * (x - ref) for x, ref in zip(logps, references))
        else:
            lengths = lengths if "lengths" in traits else (1.0, 1.0)
            chosen, rejected = (beta * x / n for x, n in zip(logps, lengths))
        if is_chosen is not None:
            rejected = torch.zeros_like(chosen)
        right = (chosen > rejected) == (True if is_chosen is None else is_chosen)
        details = torch.stack((chosen, rejected, right.to(chosen.dtype), chosen - rejected))
        return details, details.mean(1)


def paired_details(beta, *halves) -> tuple[Tensor, Tensor]:
    """Rewards, accuracies and margins of pairs with a reference, and their means."""
    return _details(["reference"], beta, halves[:2], halves[2:], None, None)


def sorting_orders(loss_type, chosen, rejected, ref_chosen, ref_rejected) -> list[Tensor]:
    """Orders in which AOT (arXiv 2406.05882) compares the four halves of a batch.

    Paired: the policy's chosen-rejected gaps against the reference's, both sorted. Unpaired: the
    chosen log-ratios against the rejected ones, both sorted.
    """
    with torch.no_grad():
        if loss_type == "aot":
            policy = torch.argsort(chosen - rejected, stable=True)
            reference = torch.argsort(ref_chosen - ref_rejected, stable=True)
            return [policy, policy, reference, reference]
        first = torch.argsort(chosen - ref_chosen, stable=True)
        second = torch.argsort(rejected - ref_rejected, stable=True)
        return [first, second, first, second]
