"""What takes the place of verl's advantage estimators and policy losses.

verl finds them by name in its registries; `patch()` swaps the entries, so configurations stay as
they are. Where a setting has no counterpart the original is called.
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf_fast.integrations.patching import Seam
from rlhf_fast.ops import PolicyLossParams, gae, group_advantages, policy_loss, value_loss
from rlhf_fast.ops.aggregation import AGGREGATIONS

CORE = "verl.trainer.ppo.core_algos"
LOG_RATIO_BOUND = 20.0
"""verl's own, of every policy loss but gspo."""


def gae_advantage(original):
    """The scan over tokens in one pass; masked tokens give 0 where verl repeats the next value."""

    def replacement(token_level_rewards, values, response_mask, gamma, lam):
        out = gae(
            token_level_rewards,
            values,
            gamma=float(gamma),
            lam=float(lam),
            mask=response_mask.bool(),
            masked="skip",
        )
        whiten = original.__globals__["verl_F"].masked_whiten
        return whiten(out.advantages, response_mask), out.returns

    return replacement


def grpo_advantage(original):
    def replacement(
        token_level_rewards,
        response_mask,
        index,
        epsilon=1e-6,
        norm_adv_by_std_in_grpo=True,
        config=None,
    ):
        advantages = group_advantages(
            token_level_rewards.sum(-1),
            estimator="grpo" if norm_adv_by_std_in_grpo else "dr_grpo",
            group_ids=_group_ids(index, token_level_rewards.device),
            epsilon=epsilon,
            keep_single=True,
        )
        return (_per_token(advantages, response_mask),) * 2

    return replacement


def rloo_advantage(keep_single: bool):
    """A response alone in its group keeps its score, or (vectorized) gets 0."""

    def replace(original):
        def replacement(
            token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
        ):
            advantages = group_advantages(
                token_level_rewards.sum(-1),
                estimator="rloo",
                group_ids=_group_ids(index, token_level_rewards.device),
                keep_single=keep_single,
            )
            return (_per_token(advantages, response_mask),) * 2

        return replacement

    return replace


def _group_ids(index, device) -> torch.Tensor:
    """verl's groups are named by any objects, in the order of the batch."""
    names = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].reshape(-1)).to(device)


def _per_token(advantages, response_mask):
    return advantages.unsqueeze(-1) * response_mask


def policy(loss_type: str, aggregation: str | None = None):
    """`aggregation`: what the loss uses whatever `loss_agg_mode` says."""

    def replace(original):
        def replacement(
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            loss_agg_mode=original.__defaults__[0],
            config=None,
            rollout_is_weights=None,
        ):
            params = _params(loss_type, aggregation or loss_agg_mode, config)
            if params is None or rollout_is_weights is not None:
                args = (loss_agg_mode, config, rollout_is_weights)
                return original(old_log_prob, log_prob, advantages, response_mask, *args)
            loss, metrics = policy_loss(
                log_prob,
                old_log_prob,
                advantages,
                mask=response_mask.bool(),
                loss_type=loss_type,
                params=params,
                normalizer=_normalizer(
                    params.aggregation, response_mask, **config.global_batch_info
                ),
            )
            clipped = metrics.clip_low + metrics.clip_high
            found = (clipped, metrics.clip_dual, metrics.old_kl_k1, metrics.old_kl_k2)
            clipped, dual, kl, kl_k2, count = torch.stack((*found, metrics.num_tokens)).tolist()
            if loss_type != "gspo_token" and not kl_k2 * count < LOG_RATIO_BOUND**2 / 2:
                kl = _bounded_kl(old_log_prob, log_prob, response_mask)
            names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
            return loss, dict(zip(names, (clipped, kl, dual)))

        return replacement

    return replace


def _bounded_kl(old_log_prob, log_prob, response_mask) -> float:
    """verl's `ppo_kl`, whose log-ratios are bounded; with k2 below, none reaches the bound."""
    log_ratio = (log_prob.detach() - old_log_prob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    mask = response_mask.bool()
    return -(log_ratio.masked_fill(~mask, 0.0).sum() / mask.sum()).item()


def _params(loss_type: str, aggregation: str, config) -> PolicyLossParams | None:
    """None for what `policy_loss` would refuse or verl has to refuse itself."""
    if config is None:
        return None
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    options = {"aggregation": aggregation, "epsilon_low": low, "epsilon_high": high}
    if loss_type == "sapo":
        options |= {"sapo_temperature_pos": config.tau_pos, "sapo_temperature_neg": config.tau_neg}
    if loss_type == "gspo_token":  # verl bounds it above only; below, e^-10 is nothing either
        options["log_ratio_bound"] = 10.0
    if loss_type == "ppo":
        options["dual_clip"] = config.get("clip_ratio_c", 3.0)
    try:
        return PolicyLossParams(**options)
    except ValueError:
        return None


def value(original):
    def replacement(
        vpreds,
        returns,
        values,
        response_mask,
        cliprange_value,
        loss_agg_mode="token-mean",
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ):
        totals = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        if loss_agg_mode not in AGGREGATIONS or not cliprange_value > 0:
            args = (vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode)
            return original(*args, *totals)
        out = value_loss(
            vpreds,
            returns,
            old_values=values,
            clip=cliprange_value,
            mask=response_mask.bool(),
            aggregate=loss_agg_mode,
            normalizer=_normalizer(loss_agg_mode, response_mask, *totals),
        )
        return out.loss, out.metrics.clip_fraction

    return replacement


def _normalizer(
    aggregation: str,
    mask,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    """What verl divides the sum by, from the whole step's counts if it knows them."""
    if aggregation == "token-sum":
        return 1.0 / dp_size
    if aggregation == "token-mean":
        count = mask.sum() if batch_num_tokens is None else batch_num_tokens
    else:
        count = (mask.sum(-1) > 0).sum() if global_batch_size is None else global_batch_size
    if aggregation == "seq-mean-token-sum-norm":
        count = count * (loss_scale_factor or mask.shape[-1])
    return count / dp_size


# ---- the table of seams --------------------------------------------------------------------------

POLICY = (
    "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='{}', config=None, "
    "rollout_is_weights=None)"
)
GRPO = (
    "(token_level_rewards, response_mask, index, epsilon=1e-06, norm_adv_by_std_in_grpo=True, "
    "config=None)",
)
RLOO = ("(token_level_rewards, response_mask, index, epsilon=1e-06, config=None, **kwargs)",)
ALGORITHMS = (
    Seam(
        f"{CORE}:compute_gae_advantage_return",
        gae_advantage,
        ("(token_level_rewards, values, response_mask, gamma, lam)",),
    ),
    Seam(f"{CORE}:compute_grpo_outcome_advantage", grpo_advantage, GRPO),
    Seam(f"{CORE}:compute_rloo_outcome_advantage", rloo_advantage(True), RLOO),
    Seam(f"{CORE}:compute_rloo_vectorized_outcome_advantage", rloo_advantage(False), RLOO),
    Seam(f"{CORE}:compute_policy_loss_vanilla", policy("ppo"), (POLICY.format("token-mean"),)),
    Seam(f"{CORE}:compute_policy_loss_cispo", policy("cispo"), (POLICY.format("token-mean"),)),
    Seam(
        f"{CORE}:compute_policy_loss_sapo",
        policy("sapo", "seq-mean-token-mean"),
        (POLICY.format("seq-mean-token-mean"),),
    ),
    Seam(
        f"{CORE}:compute_policy_loss_gspo",
        policy("gspo_token"),
        (POLICY.format("seq-mean-token-mean"),),
    ),
    Seam(
        f"{CORE}:compute_value_loss",
        value,
        (
            "(vpreds, returns, values, response_mask, cliprange_value, "
            "loss_agg_mode='token-mean', dp_size=1, batch_num_tokens=None, "
            "global_batch_size=None, loss_scale_factor=None)",
        ),
    ),
)
