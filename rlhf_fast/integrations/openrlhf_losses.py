"""What takes the place of OpenRLHF's losses and of its loops over tokens.

Of the losses `forward` is replaced, so that losses built before the patch have it too; a setting
without counterpart runs the original.
"""

from __future__ import annotations

import torch

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.patching import Seam
from rlhf_fast.ops import (
    PairData,
    PolicyLossParams,
    PreferenceParams,
    gae,
    policy_loss,
    preference_loss,
    value_loss,
)


def dpo_loss(original):
    def forward(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    ):
        logps = (policy_chosen_logps, policy_rejected_logps)
        logps = (*logps, reference_chosen_logps, reference_rejected_logps)
        if not 0 <= self.label_smoothing < 0.5:
            reason = f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}"
            return declined(original, reason)(self, *logps)
        if self.ipo:  # of summed log-probs: lengths of 1 leave them as they are
            ones = torch.ones_like(logps[0])
            kind = {"loss_type": "ipo", "data": PairData(ones, ones)}
        else:
            smoothing = PreferenceParams(label_smoothing=self.label_smoothing)
            kind = {"loss_type": "sigmoid", "params": smoothing}
        out = preference_loss(*logps, beta=self.beta, **kind)
        return out.loss, out.chosen_rewards, out.rejected_rewards

    return forward


def pairwise_loss(original):
    def forward(self, chosen_reward, reject_reward, margin=None):
        if chosen_reward.dim() != 1:
            reason = "rewards must be of shape (B,)"
            return declined(original, reason)(self, chosen_reward, reject_reward, margin)
        data = PairData(margins=margin)
        out = preference_loss(
            chosen_reward, reject_reward, loss_type="bradley_terry", beta=1.0, data=data
        )
        return out.loss

    return forward


def policy(original):
    def forward(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        totals = (dp_size, batch_num_tokens, global_batch_size)
        params, reason = _params(self, action_mask)
        if params is None:
            args = (log_probs, old_log_probs, advantages, action_mask, rollout_log_probs)
            return declined(original, reason)(self, *args, *totals)
        corrected = self.is_correction_level != "off"
        is_gspo = self.policy_loss_type == "gspo"
        mask = action_mask.bool()
        loss, metrics = policy_loss(
            log_probs,
            rollout_log_probs if corrected and is_gspo else old_log_probs,
            advantages,
            mask=mask,
            loss_type="gspo" if is_gspo else "ppo",
            params=params,
            sampling_logps=rollout_log_probs if corrected and not is_gspo else None,
            normalizer=_normalizer(self, *totals),
        )
        kl, filtered = metrics.old_kl_k1, (None, None)
        if corrected and is_gspo:
            kl = _mean(old_log_probs - log_probs.detach(), mask)
        elif corrected:
            dropped = metrics.sampling_clipped
            if self.is_correction_level == "seq":
                dropped = _dropped(self, old_log_probs - rollout_log_probs, mask)
            filtered = (metrics.sampling_kl, dropped)
        return loss, metrics.clip_low + metrics.clip_high, kl, *filtered

    return forward


def _params(loss, action_mask) -> tuple[PolicyLossParams | None, object]:
    """The settings of an OpenRLHF loss, or why they have no counterpart."""
    if action_mask is None:
        return None, "action_mask must be given"
    options = {}
    if loss.policy_loss_type == "gspo":  # its correction is the ratio to the sampler
        options["log_ratio_bound"] = float("inf")
    elif loss.is_correction_level != "off":
        if loss.is_correction_gating != "ratio":
            return None, f"is_correction_gating must be ratio, got {loss.is_correction_gating}"
        low, high = loss.is_correction_threshold
        options = {
            "sampling_low": low,
            "sampling_high": high,
            "sampling_correction": "mask" if loss.is_correction_mode == "mask" else "truncate",
            "sampling_level": "token" if loss.is_correction_level == "token" else "sequence-gate",
        }
    try:
        params = PolicyLossParams(
            epsilon_low=loss.clip_eps_low,
            epsilon_high=loss.clip_eps_high,
            dual_clip=loss.dual_clip,
            aggregation=_aggregation(loss),
            **options,
        )
    except ValueError as error:
        return None, error
    return params, None


def _dropped(loss, log_ratio, mask) -> torch.Tensor:
    """The share of sequences that the gate drops, those without a token among them."""
    low, high = loss.is_correction_threshold
    ratio = _mean(log_ratio, mask, 1).exp()
    return 1 - ((ratio >= low) & (ratio <= high)).float().mean()


def value(original):
    def forward(
        self,
        values,
        old_values,
        returns,
        action_mask=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        totals = (dp_size, batch_num_tokens, global_batch_size)
        if action_mask is None or (self.clip_eps is not None and self.clip_eps <= 0):
            args = (values, old_values, returns, action_mask, *totals)
            reason = "clip_eps must be positive or None, and action_mask given"
            return declined(original, reason)(self, *args)
        return value_loss(
            values,
            returns,
            old_values=old_values,
            clip=self.clip_eps,
            mask=action_mask.bool(),
            aggregate=_aggregation(self),
            normalizer=_normalizer(self, *totals),
        ).loss

    return forward


def _aggregation(loss) -> str:
    return "token-mean" if loss.token_level_loss else "seq-mean-token-mean"


def _mean(values, mask, dim=None) -> torch.Tensor:
    return values.masked_fill(~mask, 0.0).sum(dim) / mask.sum(dim)


def _normalizer(loss, dp_size, batch_num_tokens, global_batch_size) -> float | None:
    """From the whole step's counts, where OpenRLHF knows them."""
    total = batch_num_tokens if loss.token_level_loss else global_batch_size
    return None if total is None else total / dp_size


def advantages_and_returns(original):
    def replacement(self, values, rewards, action_mask, gamma, lambd):
        mask = None if action_mask is None else action_mask.bool()
        out = gae(rewards, values, gamma=gamma, lam=lambd, mask=mask, masked="zero")
        return out.advantages, out.returns

    return replacement


def cumulative_returns(original):
    def replacement(self, rewards, action_mask, gamma):
        mask = None if action_mask is None else action_mask.bool()
        return gae(rewards, gamma=gamma, lam=1.0, mask=mask, masked="zero").returns

    return replacement


# ---- the table of seams --------------------------------------------------------------------------

MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
TOKENS = (
    Seam(
        f"{MAKER}.get_advantages_and_returns",
        advantages_and_returns,
        ("(self, values, rewards, action_mask, gamma, lambd)",),
        if_importable=True,
    ),
    Seam(
        f"{MAKER}.get_cumulative_returns",
        cumulative_returns,
        ("(self, rewards, action_mask, gamma)",),
        if_importable=True,
    ),
)
LOSSES = (
    Seam(
        "openrlhf.models.loss:DPOLoss.forward",
        dpo_loss,
        (
            "(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, "
            "reference_rejected_logps)",
        ),
    ),
    Seam(
        "openrlhf.models.loss:PairWiseLoss.forward",
        pairwise_loss,
        ("(self, chosen_reward, reject_reward, margin=None)",),
    ),
)
POLICY_LOSS = Seam(
    "openrlhf.models.loss:PolicyLoss.forward",
    policy,
    (
        "(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, "
        "dp_size=1, batch_num_tokens=None, global_batch_size=None)",
    ),
)
VALUE_LOSS = Seam(
    "openrlhf.models.loss:ValueLoss.forward",
    value,
    (
        "(self, values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None, "
        "global_batch_size=None)",
    ),
)
