"""What takes the place of OpenRLHF's losses and of its loops over tokens.

The losses are subclasses of OpenRLHF's own: constructors, attributes and `isinstance` stay as they
are, and a setting without counterpart runs the original's `forward`.
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
    class DPOLoss(original):
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
                declined(
                    original, f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}"
                )
                return super().forward(*logps)
            if self.ipo:  # of summed log-probs: lengths of 1 leave them as they are
                ones = torch.ones_like(logps[0])
                kind = {"loss_type": "ipo", "data": PairData(ones, ones)}
            else:
                smoothing = PreferenceParams(label_smoothing=self.label_smoothing)
                kind = {"loss_type": "sigmoid", "params": smoothing}
            out = preference_loss(*logps, beta=self.beta, **kind)
            return out.loss, out.chosen_rewards, out.rejected_rewards

    return DPOLoss


def pairwise_loss(original):
    class PairWiseLoss(original):
        def forward(self, chosen_reward, reject_reward, margin=None):
            if chosen_reward.dim() != 1:
                declined(original, "rewards must be of shape (B,)")
                return super().forward(chosen_reward, reject_reward, margin)
            data = PairData(margins=margin)
            out = preference_loss(
                chosen_reward, reject_reward, loss_type="bradley_terry", beta=1.0, data=data
            )
            return out.loss

    return PairWiseLoss


def policy(original):
    class PolicyLoss(original):
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
            try:
                params = self._params(action_mask)
            except ValueError as error:
                args = (advantages, action_mask, rollout_log_probs, *totals)
                declined(original, error)
                return super().forward(log_probs, old_log_probs, *args)
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
                filtered = (metrics.sampling_kl, metrics.sampling_clipped)
                if self.is_correction_level == "seq":
                    filtered = (
                        metrics.sampling_kl,
                        self._gated(old_log_probs, rollout_log_probs, mask),
                    )
            return loss, metrics.clip_low + metrics.clip_high, kl, *filtered

        def _gated(self, old_log_probs, rollout_log_probs, mask) -> torch.Tensor:
            """The share of sequences that the gate drops, those without a token among them."""
            low, high = self.is_correction_threshold
            ratio = _mean(old_log_probs - rollout_log_probs, mask, 1).exp()
            return 1 - ((ratio >= low) & (ratio <= high)).float().mean()

        def _params(self, action_mask) -> PolicyLossParams:
            """Raises ValueError for what has no counterpart."""
            if action_mask is None:
                raise ValueError("action_mask must be given")
            options = {}
            if self.policy_loss_type == "gspo":  # its correction is the ratio to the sampler
                options["log_ratio_bound"] = float("inf")
            elif self.is_correction_level != "off":
                if self.is_correction_gating != "ratio":
                    raise ValueError(
                        f"is_correction_gating must be ratio, got {self.is_correction_gating}"
                    )
                low, high = self.is_correction_threshold
                options = {
                    "sampling_low": low,
                    "sampling_high": high,
                    "sampling_correction": "mask"
                    if self.is_correction_mode == "mask"
                    else "truncate",
                    "sampling_level": "token"
                    if self.is_correction_level == "token"
                    else "sequence-gate",
                }
            return PolicyLossParams(
                epsilon_low=self.clip_eps_low,
                epsilon_high=self.clip_eps_high,
                dual_clip=self.dual_clip,
                aggregation=_aggregation(self),
                **options,
            )

    return PolicyLoss


def value(original):
    class ValueLoss(original):
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
                declined(original, "clip_eps must be positive or None, and action_mask given")
                return super().forward(values, old_values, returns, action_mask, *totals)
            return value_loss(
                values,
                returns,
                old_values=old_values,
                clip=self.clip_eps,
                mask=action_mask.bool(),
                aggregate=_aggregation(self),
                normalizer=_normalizer(self, *totals),
            ).loss

    return ValueLoss


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
        "openrlhf.models.loss:DPOLoss",
        dpo_loss,
        (
            "__init__(self, beta, label_smoothing=0.0, ipo=False)",
            "forward(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, "
            "reference_rejected_logps)",
        ),
    ),
    Seam(
        "openrlhf.models.loss:PairWiseLoss",
        pairwise_loss,
        ("forward(self, chosen_reward, reject_reward, margin=None)",),
    ),
)
POLICY_LOSS = Seam(
    "openrlhf.models.loss:PolicyLoss",
    policy,
    (
        "__init__(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, "
        "token_level_loss=True, policy_loss_type='ppo', is_correction_level='off', "
        "is_correction_mode='mask', is_correction_gating='ratio', "
        "is_correction_threshold=(0.5, 5.0))",
        "forward(self, log_probs, old_log_probs, advantages, action_mask=None, "
        "rollout_log_probs=None, dp_size=1, batch_num_tokens=None, global_batch_size=None)",
    ),
)
VALUE_LOSS = Seam(
    "openrlhf.models.loss:ValueLoss",
    value,
    (
        "__init__(self, clip_eps=None, token_level_loss=True)",
        "forward(self, values, old_values, returns, action_mask=None, dp_size=1, "
        "batch_num_tokens=None, global_batch_size=None)",
    ),
)
