"""Preference losses of sequence log-probabilities, per pair: the caller divides by its normaliser.

All inputs are [B] sums over response tokens unless said otherwise. `ops.preference_loss` has the
other losses by name, and reductions. Here are those that need more than a name.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import (
    PairData,
    PreferenceParams,
    preference_loss,
    unpaired_preference_loss,
)
from rlhf_fast.ops.native import check
from rlhf_fast.ops.sequences import check_like, check_mask


class PreferenceLoss(NamedTuple):
    """Per-pair loss and the implicit rewards it compares; rewards carry no gradient."""

    loss: Tensor  # [B]
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


def _per_pair(*logps: Tensor, **kwargs) -> PreferenceLoss:
    return PreferenceLoss(*preference_loss(*logps, reduction="none", **kwargs)[:3])


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

    Source: arXiv 2305.18290, equation 7; label smoothing is the authors' conservative DPO.
    """
    return _per_pair(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        params=PreferenceParams(label_smoothing=label_smoothing),
    )


def inpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_logps: tuple[Tensor, Tensor],
    previous_logps: tuple[Tensor, Tensor],
    *,
    eta: float = 0.005,
    tau: float = 0.0025,
) -> PreferenceLoss:
    """Iterative Nash policy optimisation against a fixed reference and the previous iterate.

    `(h - 1 / (2 eta))^2` with `h = log(pi_w / pi_l) - tau/eta log(ref_w / ref_l) - (1 - tau/eta)
    log(prev_w / prev_l)`: IPO whose reference is the geometric mixture of the two.

    Args:
        ref_logps: (chosen, rejected) under the fixed reference.
        previous_logps: (chosen, rejected) under the policy of the previous iteration.
        tau: in [0, eta]; 0 forgets the fixed reference.

    Source: arXiv 2407.00617, equation 8; algorithm 1 takes it in every iteration.
    """
    check(0 < eta < math.inf, "inpo_loss", "eta must be positive and finite", eta, "try 0.005")
    check(0 <= tau <= eta, "inpo_loss", "tau must lie in [0, eta]", tau, f"eta is {eta}")
    mixed = (torch.lerp(p, r, tau / eta) for p, r in zip(previous_logps, ref_logps))
    return _per_pair(chosen_logps, rejected_logps, *mixed, loss_type="ipo_sum", beta=eta)


def xpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_is_from_ref: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
) -> PreferenceLoss:
    """Exploratory preference optimisation: DPO plus `alpha * log pi(the reference's sample)`.

    Each pair is one sample of the policy and one of the reference; the bonus makes what the
    reference would say less likely. chosen_is_from_ref: bool [B].

    Source: arXiv 2405.21046, algorithm 1.
    """
    check(0 <= alpha < math.inf, "xpo_loss", "alpha must be at least 0", alpha, "0 is DPO")
    check_mask("xpo_loss", chosen_is_from_ref, chosen_logps, "chosen_is_from_ref")
    result = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    from_ref = torch.where(chosen_is_from_ref, chosen_logps, rejected_logps)
    return result._replace(loss=result.loss + alpha * from_ref)


def nash_md_loss(logps: Tensor, ref_logps: Tensor, win_rates: Tensor, *, tau: float) -> Tensor:
    """Policy gradient of Nash mirror descent, [B].

    `-(win_rates - 1/2 - tau * log(pi / ref)) * log pi`, the bracket held constant. win_rates: P(y
    beats y') by the preference model, y from the policy, y' from its mixture with the reference.

    Source: arXiv 2312.00886, equation 13 (appendix F.2). TRL's NashMDTrainer pairs the log-prob of
    a token with that token's log-ratio alone, another gradient for more than one token.
    """
    for name, tensor in (("ref_logps", ref_logps), ("win_rates", win_rates)):
        check_like("nash_md_loss", name, tensor, logps)
    advantage = win_rates - 0.5 - tau * (logps - ref_logps)
    return -advantage.detach() * logps


class SelfRevisionLogRatios(NamedTuple):
    """log(pi / ref) of the winning and the losing response, plain and as revisions, each [B]."""

    win: Tensor
    lose: Tensor
    win_after_lose: Tensor
    lose_after_lose: Tensor
    lose_after_win: Tensor
    win_after_win: Tensor


def srpo_loss(
    ratios: SelfRevisionLogRatios, *, beta: float = 0.1, alpha: float = 0.8, target: float = 1.0
) -> Tensor:
    """Self-improving robust preference optimisation, [B].

    `alpha` weighs the self-improvement terms, `1 - alpha` the generator's. The optimal reviser
    satisfies P(y2 beats y1) = beta * (ratio(y2 | y1) - ratio(y1)) + constant; the terms are the
    squared violations of that for (y2, y1) against (y1, y2), and against (y1, y1), where P = 1/2.

    Source: arXiv 2406.01660; the same model, with y1 in its prompt, revises. The paper's equations
    could not be consulted: terms and weights, alpha = 0.8 included, are those of the public program
    for it, which is not its authors' (TRL pull request 1772).
    """
    check(0 < beta < math.inf, "srpo_loss", "beta must be positive and finite", beta, "try 0.1")
    check(0 <= alpha <= 1, "srpo_loss", "alpha must lie in [0, 1]", alpha, "0 is the generator's")
    for name, tensor in ratios._asdict().items():
        check_like("srpo_loss", name, tensor, ratios.win)
    r, gap = ratios, target - 0.5
    against = r.win_after_lose - r.lose_after_win + r.win - r.lose
    generator = (2 * gap - beta * against).square()
    improve = (gap - beta * (r.win_after_lose - r.lose_after_lose)).square()
    spoil = (-gap - beta * (r.lose_after_win - r.win_after_win)).square()
    return (1 - alpha) * generator + alpha * (improve + spoil)


def cpl_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, alpha: float = 0.1, bias: float = 1.0
) -> PreferenceLoss:
    """Contrastive preference learning: `-logsigmoid(alpha * (log pi_w - bias * log pi_l))`.

    No reference model. `bias` (the paper's lambda) below 1 favours staying on the data. For a
    discount, sum log-probs by `segment_sum(logps, weights=gamma**t)`.

    Source: arXiv 2310.13639, equation 5, and 6 with the bias.
    """
    check(0 < bias <= 1, "cpl_loss", "bias must lie in (0, 1]", bias, "1 is without bias")
    return _per_pair(chosen_logps, bias * rejected_logps, loss_type="cpo", beta=alpha)


def slic_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_answer_logps: Tensor | None = None,
    *,
    delta: float = 1.0,
    regularization: float = 0.0,
) -> PreferenceLoss:
    """Sequence likelihood calibration: `max(0, delta - log pi_w + log pi_l)`, no reference model.

    Minus `regularization * reference_answer_logps`, log-probs [B] of supervised answers.

    Source: SLiC-HF, arXiv 2305.10425, equation 1.
    """
    params = PreferenceParams(margin=delta)
    result = _per_pair(chosen_logps, rejected_logps, loss_type="slic", beta=1.0, params=params)
    if reference_answer_logps is None:
        return result
    return result._replace(loss=result.loss - regularization * reference_answer_logps)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """NLL of the chosen response plus `beta` times the odds-ratio loss of mean log-probs.

    Source: arXiv 2403.07691, equations 6 and 7 (beta is its lambda).
    """
    return _per_pair(
        chosen_logps,
        rejected_logps,
        loss_type="orpo",
        beta=beta,
        params=PreferenceParams(nll_weight=1.0),
        data=PairData(chosen_lengths, rejected_lengths),
    )


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> PreferenceLoss:
    """`-logsigmoid(beta * (chosen_logps / |chosen| - rejected_logps / |rejected|) - gamma)`.

    Source: arXiv 2405.14734, equation 6.
    """
    return _per_pair(
        chosen_logps,
        rejected_logps,
        loss_type="simpo",
        beta=beta,
        params=PreferenceParams(margin=gamma),
        data=PairData(chosen_lengths, rejected_lengths),
    )


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    is_chosen: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """Kahneman-Tversky optimisation of single responses labelled good or bad, [B].

    kl: [] estimate of KL(pi || ref), the mean of log(pi / ref) over responses paired with other
    prompts, over all ranks; negative ones count as 0. The second rewards field is zeros.

    Source: arXiv 2402.01306, equation 7.
    """
    params = PreferenceParams(chosen_weight=desirable_weight, rejected_weight=undesirable_weight)
    data = PairData(baseline=kl.detach().clamp(min=0))
    out = unpaired_preference_loss(
        logps, is_chosen, ref_logps, beta=beta, params=params, data=data, reduction="none"
    )
    return PreferenceLoss(*out[:3])
