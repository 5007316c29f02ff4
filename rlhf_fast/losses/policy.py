"""From rewards to what `ops.policy_loss` takes, where a method needs more than a name.

`ops.policy_loss` has the losses by name, `ops.group_advantages` the baselines over a prompt's
completions, `ops.gae` and `ops.macro_gae` those of a value model. Tokens are (B, T) with a mask,
True where a token counts. Nothing here carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import gae, whiten


def token_rewards(
    rewards: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    kl_bound: float = 10.0,
) -> Tensor:
    """A reward per token: -kl_coef * KL estimate, and each completion's reward at its last token.

    KL in the reward, as in InstructGPT (arXiv 2203.02155, section 3.5) and REINFORCE++ (arXiv
    2501.03262); `kl_coef` in `ops.PolicyLossParams` puts it into the loss instead.

    Args:
        rewards: (B,), one per completion; a completion without a token loses it.
        kl_estimator: k1, k2 or k3, bounded to +-kl_bound as in OpenRLHF.
    """
    delta = (logps - ref_logps).detach().float()
    kl = {
        "k1": delta,
        "k2": delta.square() / 2,
        "k3": torch.expm1(-delta.clamp(min=-kl_bound)) + delta.clamp(min=-kl_bound),
    }[kl_estimator]
    shaped = -kl_coef * kl.clamp(-kl_bound, kl_bound).masked_fill(~mask, 0.0)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(1, keepdim=True)
    return shaped + rewards.float()[:, None] * (position == last)


def reinforce_plus_plus_advantages(
    token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, statistics: Tensor | None = None
) -> Tensor:
    """Discounted returns, whitened over the tokens of the batch.

    Source: REINFORCE++, arXiv 2501.03262. For several processes, pass the sum of their
    `ops.whiten_statistics` of the returns.
    """
    returns = gae(token_rewards, gamma=gamma, lam=1.0, mask=mask).returns
    return whiten(returns, mask, statistics=statistics)


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Reward minus that of the greedy completion of the same prompt: (B,). arXiv 2310.10505."""
    return (rewards - greedy_rewards).detach()


def oreal_advantages(advantages: Tensor, token_scores: Tensor, is_right: Tensor) -> Tensor:
    """Advantages per token that credit what a token-level reward model marks.

    A token of score w counts max(2 sigmoid(w) - 1, 0) in a right completion and
    max(1 - 2 sigmoid(w), 0) in a wrong one: what speaks for the outcome.

    Source: OREAL, arXiv 2502.06781.

    Args:
        advantages, is_right: (B,). Right completions are cloned (advantage 1 and loss_type
            reinforce); of the wrong ones OREAL takes the leave-one-out advantage.
        token_scores: (B, T).
    """
    weight = 2 * torch.sigmoid(token_scores.detach().float()) - 1
    weight = torch.where(is_right[:, None], weight, -weight).clamp(min=0)
    return advantages.detach()[:, None] * weight


def keep_high_entropy(advantages: Tensor, entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Advantages (B, T), 0 but for the `share` of tokens whose entropy is highest.

    Source: "Beyond the 80/20 rule", arXiv 2506.01939; there the share is 0.2.
    """
    if not 0 < share <= 1:
        raise ValueError(f"keep_high_entropy: share must lie in (0, 1], got {share}; 1 keeps all")
    if not mask.any():
        return torch.zeros_like(entropy)
    threshold = torch.quantile(entropy.detach()[mask].float(), 1 - share)
    advantages = advantages.detach()
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return torch.where(mask & (entropy >= threshold), advantages, 0.0)
