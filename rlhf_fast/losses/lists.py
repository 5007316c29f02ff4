"""Losses of several responses per prompt, from sequence log-probabilities.

Groups of any size lie one after another: logps and rewards are [N], cu_groups [G + 1] says where
each begins. Every function returns the mean over groups; `ops.list_loss` has other reductions.
"""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_fast.ops import list_loss
from rlhf_fast.ops.native import check
from rlhf_fast.ops.sequences import check_like


def lipo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "lipo_lambda",
) -> Tensor:
    """Listwise preference optimisation of scores `beta * (logps - ref_logps)`.

    loss_type: lipo_lambda, or list_mle, pairwise_logistic (DPO over all pairs), pairwise_hinge.
    The weights of lipo_lambda are powers of 2 of the rewards: bring them to a scale of a few units.

    Source: arXiv 2402.01878, equations 8, 7, 5 and 6 in this order; section 3 for the weights.
    """
    check(0 < beta < math.inf, "lipo_loss", "beta must be positive and finite", beta, "try 0.1")
    check_like("lipo_loss", "ref_logps", ref_logps, logps)
    scores = beta * (logps - ref_logps)
    return list_loss(scores, rewards, cu_groups, loss_type=loss_type)


def rrhf_loss(
    logps: Tensor, lengths: Tensor, rewards: Tensor, cu_groups: Tensor, *, nll_weight: float = 1.0
) -> Tensor:
    """Rank responses by mean log-prob: hinge over all pairs, plus the best one's NLL.

    Source: RRHF, arXiv 2304.05302, equations 2 to 4; the NLL is a mean over tokens, as in its code.
    """
    check_like("rrhf_loss", "lengths", lengths, logps)
    scores = logps / lengths.clamp(min=1)
    return list_loss(scores, rewards, cu_groups, loss_type="rrhf", nll_weight=nll_weight)


def pro_loss(
    logps: Tensor, lengths: Tensor, rewards: Tensor, cu_groups: Tensor, *, nll_weight: float = 0.05
) -> Tensor:
    """Preference ranking optimisation: each response against all worse ones, temperatures from
    reward gaps, plus the best one's NLL, all on mean log-probs.

    Source: arXiv 2306.17492, equations 5 to 9. There, and in the authors' program, the NLL is a sum
    over tokens, weighed by 0.05 (K - 1)^2 for K responses.
    """
    check_like("pro_loss", "lengths", lengths, logps)
    scores = logps / lengths.clamp(min=1)
    return list_loss(scores, rewards, cu_groups, loss_type="pro", nll_weight=nll_weight)
