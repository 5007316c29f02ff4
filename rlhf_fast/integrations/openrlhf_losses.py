"""What takes the place of OpenRLHF's losses.

The losses are subclasses of OpenRLHF's own: constructors, attributes and `isinstance` stay as they
are, and a setting without counterpart runs the original's `forward`.
"""

from __future__ import annotations

import torch

from rlhf_fast.integrations.patching import Seam
from rlhf_fast.ops import (
    PairData,
    PreferenceParams,
    preference_loss,
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


# ---- the table of seams --------------------------------------------------------------------------

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
