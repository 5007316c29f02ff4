"""What takes the place of verl's advantage estimators.

verl finds them by name in its registry; `patch()` swaps the entries, so configurations stay as they
are. `gdpo` calls that of `grpo`; `remax` and the optimal token baselines stay verl's.
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.patching import Seam
from rlhf_fast.ops import gae, group_advantages

CORE = "verl.trainer.ppo.core_algos"


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
        return _whiten(original, out.advantages, response_mask), out.returns

    return replacement


def reinforce_plus_plus_advantage(original):
    def replacement(token_level_rewards, response_mask, config=None, **kwargs):
        if config is None:
            return original(token_level_rewards, response_mask, config, **kwargs)
        returns = gae(
            token_level_rewards,
            gamma=float(config.gamma),
            lam=1.0,
            mask=response_mask.bool(),
            masked="skip",
        ).returns
        return _whiten(original, returns, response_mask) * response_mask, returns

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


def pass_at_k_advantage(original):
    def replacement(
        token_level_rewards,
        response_mask,
        index,
        epsilon=1e-6,
        norm_adv_by_std_in_grpo=True,
        config=None,
        **kwargs,
    ):
        group_ids = _group_ids(index, token_level_rewards.device)
        reason = None
        if config is None or not config.get("norm_adv_by_std_in_grpo", True):
            reason = "the best response's lead is divided by the standard deviation"
        elif (group_ids.bincount() < 2).any():
            reason = "groups must have two responses or more"
        if reason is not None:
            args = (token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo)
            return declined(original, reason)(*args, config, **kwargs)
        advantages = group_advantages(
            token_level_rewards.sum(-1), estimator="best", group_ids=group_ids, epsilon=epsilon
        )
        return (_per_token(advantages, response_mask),) * 2

    return replacement


def group_baseline(estimator: str, *, keep_single: bool = True, whitened: bool = False):
    """A response alone in its group keeps its score, or (rloo_vectorized) gets 0."""

    def replace(original):
        def replacement(
            token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
        ):
            advantages = group_advantages(
                token_level_rewards.sum(-1),
                estimator=estimator,
                group_ids=_group_ids(index, token_level_rewards.device),
                lengths=response_mask.sum(-1) if estimator == "opo" else None,
                keep_single=keep_single,
            )
            advantages = _per_token(advantages, response_mask)
            if whitened:
                advantages = _whiten(original, advantages, response_mask) * response_mask
            return (advantages,) * 2

        return replacement

    return replace


def gpg_advantage(original):
    def replacement(
        token_level_rewards,
        response_mask,
        index,
        epsilon=1e-6,
        f_norm=1.0,
        alpha=1.0,
        config=None,
        **kwargs,
    ):
        scores = token_level_rewards.sum(-1)
        advantages = group_advantages(
            scores,
            estimator="dr_grpo",
            group_ids=_group_ids(index, scores.device),
            keep_single=True,
        )
        alpha = len(scores) / scores.count_nonzero().clamp(min=1)
        return (_per_token(alpha / f_norm * advantages, response_mask),) * 2

    return replacement


def _group_ids(index, device) -> torch.Tensor:
    """verl's groups are named by any objects, in the order of the batch."""
    names = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].reshape(-1)).to(device)


def _per_token(advantages, response_mask):
    return advantages.unsqueeze(-1) * response_mask


def _whiten(original, values, response_mask):
    return original.__globals__["verl_F"].masked_whiten(values, response_mask)


# ---- the table of seams --------------------------------------------------------------------------

REWARDS = "token_level_rewards, response_mask"
GRPO = f"({REWARDS}, index, epsilon=1e-06, norm_adv_by_std_in_grpo=True, config=None{{}})"
OF_GROUPS = f"({REWARDS}, index, epsilon=1e-06, config=None, **kwargs)"


def _seam(name: str, replace, signature: str) -> Seam:
    return Seam(f"{CORE}:compute_{name}_advantage", replace, (signature,))


ADVANTAGES = (
    Seam(
        f"{CORE}:compute_gae_advantage_return",
        gae_advantage,
        ("(token_level_rewards, values, response_mask, gamma, lam)",),
    ),
    _seam("grpo_outcome", grpo_advantage, GRPO.format("")),
    _seam("grpo_vectorized_outcome", grpo_advantage, GRPO.format("")),
    _seam("grpo_passk_outcome", pass_at_k_advantage, GRPO.format(", **kwargs")),
    _seam("rloo_outcome", group_baseline("rloo"), OF_GROUPS),
    _seam("rloo_vectorized_outcome", group_baseline("rloo", keep_single=False), OF_GROUPS),
    _seam("opo_outcome", group_baseline("opo"), OF_GROUPS),
    _seam(
        "reinforce_plus_plus_baseline_outcome",
        group_baseline("dr_grpo", whitened=True),
        OF_GROUPS,
    ),
    _seam(
        "reinforce_plus_plus_outcome",
        reinforce_plus_plus_advantage,
        f"({REWARDS}, config=None, **kwargs)",
    ),
    _seam(
        "gpg_outcome",
        gpg_advantage,
        f"({REWARDS}, index, epsilon=1e-06, f_norm=1.0, alpha=1.0, config=None, **kwargs)",
    ),
)
