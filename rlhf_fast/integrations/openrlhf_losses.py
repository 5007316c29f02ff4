"""What takes the place of OpenRLHF's losses and of its loops over tokens.

The losses are subclasses of OpenRLHF's own: constructors, attributes and `isinstance` stay as they
are, and a setting without counterpart runs the original's `forward`.
"""

from __future__ import annotations

import torch

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
            params = self._params()
            if params is None or action_mask is None:
                totals = (dp_size, batch_num_tokens, global_batch_size)
                args = (advantages, action_mask, rollout_log_probs, *totals)
                return super().forward(log_probs, old_log_probs, *args)
            corrected = self.is_correction_level != "off"
            loss, metrics = policy_loss(
                log_probs,
                old_log_probs,
                advantages,
                mask=action_mask.bool(),
                loss_type="ppo" if self.policy_loss_type == "ppo" else "gspo",
                params=params,
                sampling_logps=rollout_log_probs if corrected else None,
                normalizer=_normalizer(self, dp_size, batch_num_tokens, global_batch_size),
            )
            filtered = (metrics.sampling_kl, metrics.sampling_clipped) if corrected else (None,) * 2
            return loss, metrics.clip_low + metrics.clip_high, metrics.old_kl_k1, *filtered

        def _params(self) -> PolicyLossParams | None:
            """None for corrections by sequence or by divergence, and for corrected gspo."""
            level, gating = self.is_correction_level, self.is_correction_gating
            if level != "off" and (level, gating, self.policy_loss_type) != (
                "token",
                "ratio",
                "ppo",
            ):
                return None
            options = {}
            if level != "off":
                low, high = self.is_correction_threshold
                mode = "mask" if self.is_correction_mode == "mask" else "truncate"
                options = {"sampling_low": low, "sampling_high": high, "sampling_correction": mode}
            if self.policy_loss_type == "gspo":
                options["log_ratio_bound"] = float("inf")
            if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_eps_high:
                return None
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
