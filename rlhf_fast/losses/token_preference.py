"""What preference losses make of single tokens: weights of responses, rewards of tokens.

Tokens lie as for `ops.token_preference_loss`: rows (2B, T), or packed (N,) with `cu_seqlens`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.losses.preference import PreferenceLoss
from rlhf_fast.ops import segment_sum, token_preference_loss


def wpo_weights(
    logps: Tensor,
    log_sum_p2: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    maximum: float | None = None,
) -> Tensor:
    """Weight of each response, `exp(mean over tokens of logp - log(sum p^2))`, without gradient.

    A pair's weight is the product of its responses' weights: `PairData(weights=...)`. How likely
    the policy is to have said it, relative to what it says itself. Tokens lie as for
    `ops.segment_sum`; log_sum_p2 is the log of `ops.logps`' sum_p2.

    Source: arXiv 2406.11827, equation 2. The authors' code caps the pair's weight at 1.
    """
    aligned = (logps - log_sum_p2).detach()
    weights = segment_sum(aligned, cu_seqlens=cu_seqlens, mask=mask, mean=True).exp()
    return weights if maximum is None else weights.clamp(max=maximum)


def contrastive_token_rewards(better_logps: Tensor, worse_logps: Tensor) -> Tensor:
    """Rewards in (-1/2, 1/2) of a response's tokens: `sigmoid(better_logps - worse_logps) - 1/2`.

    What the reference model gives the same tokens after a prompt that asks for a better response,
    and after one that asks for a worse response; any shape, without gradient.

    Source: T-REG, arXiv 2412.02685, section on contrastive prompting.
    """
    return torch.sigmoid((better_logps - worse_logps).detach()) - 0.5


def treg_loss(
    logps: Tensor,
    ref_logps: Tensor,
    token_rewards: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    interleaved: bool = False,
    beta: float = 0.1,
    alpha: float = 0.25,
) -> PreferenceLoss:
    """Token-level reward regularisation: DPO, and each token drawn to the sign of its reward, [B].

    Equivalent to `-logsigmoid(h) - alpha * sigmoid(-h) * beta * (token_rewards * logps).sum()`, the
    sum over the tokens of both responses, h as in `dpo_loss`. The constant factor `sigmoid(-h)`
    is the size of DPO's own gradient: pairs that have been learned are left alone.

    Args:
        logps: (2B, T), or packed (N,); `mask`, `interleaved` as in `ops.token_preference_loss`.
        ref_logps: like logps, or [2B] sums.
        token_rewards: like logps, constants; see `contrastive_token_rewards`.
        alpha: weight of the second term; the authors try 0.1, 0.25 and 0.5. 0 is DPO.

    Raises:
        ValueError: as `ops.token_preference_loss` and `ops.segment_sum`, and for alpha below 0.

    Source: T-REG, arXiv 2412.02685. Neither its equations nor the authors' program could be
    consulted: the terms are those on which three independent accounts of the paper agree.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"treg_loss: alpha must be at least 0, got {alpha}; 0 is DPO")
    where = {"cu_seqlens": cu_seqlens, "mask": mask}
    pairs = token_preference_loss(
        logps, ref_logps, **where, interleaved=interleaved, beta=beta, reduction="none"
    )
    agreement = segment_sum(logps, **where, weights=token_rewards.detach())
    agreement = agreement.view(-1, 2).sum(1) if interleaved else agreement.view(2, -1).sum(0)
    loss = pairs.loss - alpha * beta * torch.sigmoid(-pairs.margins) * agreement
    return PreferenceLoss(loss, pairs.chosen_rewards, pairs.rejected_rewards)
