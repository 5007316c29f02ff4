"""From rewards to what `ops.policy_loss` takes, where a method needs more than a name.

`ops.policy_loss` has the losses by name, `ops.group_advantages` the baselines over a prompt's
completions, `ops.gae` and `ops.macro_gae` those of a value model. Tokens are (B, T) with a mask,
True where a token counts. Nothing here carries a gradient, but `kl_cov_penalty`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import gae, segment_sum, whiten
from rlhf_fast.ops.native import check
from rlhf_fast.ops.policy_params import KL_ESTIMATORS
from rlhf_fast.ops.sequences import check_like, check_mask


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
    2501.03262, equation 4); `kl_coef` in `ops.PolicyLossParams` puts it into the loss instead.

    Args:
        rewards: (B,), one per completion; a completion without a token loses it.
        kl_estimator: k1, k2 or k3, bounded to +-kl_bound as in OpenRLHF.
    """
    op = "token_rewards"
    must = f"kl_estimator must be one of {KL_ESTIMATORS}"
    check(kl_estimator in KL_ESTIMATORS, op, must, kl_estimator, "k1 is the log-ratio")
    check_like(op, "ref_logps", ref_logps, logps)
    check_mask(op, mask, logps)
    check_like(op, "rewards", rewards, logps, logps.shape[:1])
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

    Source: REINFORCE++, arXiv 2501.03262, equations 4 and 5. For several processes, pass the sum
    of their `ops.whiten_statistics` of the returns.
    """
    returns = gae(token_rewards, gamma=gamma, lam=1.0, mask=mask).returns
    return whiten(returns, mask, statistics=statistics)


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Reward minus that of the greedy completion of the same prompt: (B,). arXiv 2310.10505."""
    check_like("remax_advantages", "greedy_rewards", greedy_rewards, rewards)
    return (rewards - greedy_rewards).detach()


def oreal_advantages(advantages: Tensor, token_scores: Tensor, is_right: Tensor) -> Tensor:
    """Advantages per token that credit what a token-level reward model marks.

    A token of score w counts max(2 sigmoid(w) - 1, 0) in a right completion and
    max(1 - 2 sigmoid(w), 0) in a wrong one: what speaks for the outcome.

    Source: OREAL, arXiv 2502.06781, equation 10; equation 11 is the loss. The authors' program
    takes for w the running mean of the scores up to a token; pass that for the same weights.

    Args:
        advantages, is_right: (B,). Right completions are cloned (advantage 1 and loss_type
            reinforce); of the wrong ones OREAL takes the leave-one-out advantage.
        token_scores: (B, T).
    """
    for name, tensor in (("advantages", advantages), ("is_right", is_right)):
        check_like("oreal_advantages", name, tensor, token_scores, token_scores.shape[:1])
    weight = 2 * torch.sigmoid(token_scores.detach().float()) - 1
    weight = torch.where(is_right[:, None], weight, -weight).clamp(min=0)
    return advantages.detach()[:, None] * weight


def keep_high_entropy(advantages: Tensor, entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Advantages (B, T), 0 but for the `share` of tokens whose entropy is highest.

    Source: "Beyond the 80/20 rule", arXiv 2506.01939, equation 6; there the share is 0.2, and the
    mean is over what is kept: pass `normalizer=share * mask.sum()` to `ops.policy_loss`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"keep_high_entropy: share must lie in (0, 1], got {share}; 1 keeps all")
    check_mask("keep_high_entropy", mask, entropy)
    if not mask.any():
        return torch.zeros_like(entropy)
    known = entropy.detach()[mask].float()
    place = math.ceil((1 - share) * (len(known) - 1) - 1e-9)  # torch.quantile ends at 2^24 tokens
    threshold = known.kthvalue(place + 1).values
    advantages = _per_token("keep_high_entropy", advantages, mask)
    return torch.where(mask & (entropy >= threshold), advantages, 0.0)


def token_covariances(advantages: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T): (A - mean of A) * (logp - mean of logp), means over the batch; 0 where masked.

    Its mean is what lowers the entropy in a step of policy gradient.

    Source: "The entropy mechanism of RL for reasoning", arXiv 2505.22617, equation 10.
    """
    check_mask("token_covariances", mask, logps)
    x, y = _per_token("token_covariances", advantages, mask), logps.detach().float()
    count = mask.sum().clamp(min=1)
    centred = (v.masked_fill(~mask, 0.0) for v in (x, y))
    centred = [v - v.sum() / count for v in centred]
    return (centred[0] * centred[1]).masked_fill(~mask, 0.0)


def drawn_covariances(
    advantages: Tensor,
    logps: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    spared: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, T) bool: `share` of the tokens, one at least, drawn from those of high covariance.

    Those are the tokens that count whose `token_covariances` lie between `low` and `high`, but for
    the `spared`, (B, T) bool.

    Source: Clip-Cov, arXiv 2505.22617, equation 11.
    """
    if not (0 < share <= 1 and low < high):
        raise ValueError(
            f"drawn_covariances: share must lie in (0, 1] and low below high, got {share}, "
            f"{low} and {high}; the authors take 2e-4, 1 and 5"
        )
    covariances = token_covariances(advantages, logps, mask)
    candidates = mask & (covariances > low) & (covariances < high)
    if spared is not None:
        check_mask("drawn_covariances", spared, logps, "spared")
        candidates &= ~spared
    candidates = candidates.flatten().nonzero()[:, 0]
    count = max(int(share * int(mask.sum())), 1)
    drawn = torch.randperm(len(candidates), generator=generator)[:count].to(mask.device)
    return torch.zeros_like(mask).flatten().index_fill(0, candidates[drawn], True).view(mask.shape)


def clip_cov_advantages(
    advantages: Tensor,
    logps: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Advantages (B, T) for Clip-Cov: 0 at `drawn_covariances`.

    These tokens still count in a mean over tokens, and pass no gradient. verl also spares tokens
    that PPO's clip cuts off; those have no gradient either way.

    Source: Clip-Cov, arXiv 2505.22617, equations 11 and 12.
    """
    settings = {"share": share, "low": low, "high": high, "generator": generator}
    drawn = drawn_covariances(advantages, logps, mask, **settings)
    return _per_token("clip_cov_advantages", advantages, mask).masked_fill(drawn, 0.0)


def highest_covariances(
    advantages: Tensor, logps: Tensor, mask: Tensor, *, share: float = 2e-4
) -> Tensor:
    """(B, T) bool: the `share` of the tokens that count, one at least, of highest covariance.

    Source: KL-Cov, arXiv 2505.22617, equation 13.
    """
    if not 0 < share <= 1:
        raise ValueError(f"highest_covariances: share must lie in (0, 1], got {share}; try 2e-4")
    num_tokens = int(mask.sum())
    covariances = token_covariances(advantages, logps, mask).masked_fill(~mask, -torch.inf)
    worst = covariances.flatten().topk(min(max(int(share * num_tokens), 1), num_tokens)).indices
    return torch.zeros_like(mask).flatten().index_fill(0, worst, True).view(mask.shape)


def kl_cov_penalty(
    advantages: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    coef: float = 1.0,
) -> Tensor:
    """What KL-Cov adds to the loss: coef * |logp - old_logp| at tokens of highest covariance, /N.

    Differentiable in logps. Of the N tokens that count `highest_covariances` are penalised; the
    rest of the loss is `policy_loss` with `epsilon_low=1` and a large `epsilon_high`: no clip.

    Source: KL-Cov, arXiv 2505.22617, equations 13 and 14, with |.| for the KL as in its listing 1.
    """
    worst = highest_covariances(advantages, logps, mask, share=share)
    return coef * (logps - old_logps)[worst].abs().sum() / mask.sum().clamp(min=1)


def mask_off_policy_sequences(
    advantages: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    threshold: float,
) -> Tensor:
    """Advantages (B,), 0 where negative and the sequence's KL(old || new) exceeds `threshold`.

    The KL is estimated by the mean of old_logps - logps over the sequence's tokens. old_logps may
    be the sampler's; NaN, where it reported none, counts as no difference. logps and old_logps are
    (B, T) with a mask; or with `cu_seqlens` packed (N,), as then are the advantages.

    Source: off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556, equation 9.
    """
    if not threshold >= 0:
        raise ValueError(
            f"mask_off_policy_sequences: threshold must be at least 0, got {threshold}; it bounds "
            "a KL in nats per token"
        )
    op = "mask_off_policy_sequences"
    check_like(op, "old_logps", old_logps, logps)
    is_packed = cu_seqlens is not None
    check_like(op, "advantages", advantages, logps, logps.shape if is_packed else logps.shape[:1])
    gaps = (old_logps - logps).detach().masked_fill(old_logps.isnan(), 0.0)
    kl = segment_sum(gaps, mask=mask, cu_seqlens=cu_seqlens, mean=True)
    if is_packed:
        kl = kl.repeat_interleave(cu_seqlens.diff(), output_size=len(logps))
    return advantages.detach().masked_fill((advantages < 0) & (kl > threshold), 0.0)


def n_step_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, *, num_steps: int, gamma: float = 1.0
) -> Tensor:
    """(B, T): the next `num_steps` rewards, discounted, and gamma^num_steps times the value there.

    Equivalent to `sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * V[t + n]` over the tokens
    that count; rewards and values after a sequence's last token are 0. With `num_steps` at least
    the length these are the returns of `ops.gae` with lam=1.

    Source: "Asynchronous methods for deep reinforcement learning", arXiv 1602.01783, section 4.
    """
    if num_steps < 1:
        raise ValueError(f"n_step_returns: num_steps must be at least 1, got {num_steps}; 1 is TD")
    if not 0 <= gamma <= 1:
        raise ValueError(f"n_step_returns: gamma must lie in [0, 1], got {gamma}; 1 discounts none")
    check_like("n_step_returns", "values", values, rewards)
    check_mask("n_step_returns", mask, rewards)
    order = torch.argsort(~mask, dim=1, stable=True)  # the tokens that count come first
    reward, value = (
        x.detach().float().masked_fill(~mask, 0.0).gather(1, order) for x in (rewards, values)
    )
    width, total = mask.shape[1], torch.zeros_like(reward)
    for step in range(min(num_steps, width)):
        total[:, : width - step] += gamma**step * reward[:, step:]
    if num_steps < width:
        total[:, : width - num_steps] += gamma**num_steps * value[:, num_steps:]
    return torch.zeros_like(total).scatter(1, order, total).masked_fill(~mask, 0.0)


def _per_token(op: str, advantages: Tensor, mask: Tensor) -> Tensor:
    shape = mask.shape[:1] if advantages.dim() == 1 else mask.shape
    check_like(op, "advantages", advantages, mask, shape)
    advantages = advantages.detach().float()
    return advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
