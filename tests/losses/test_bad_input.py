"""What does not fit is refused by name: nothing is broadcast, and no setting is taken on trust."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import losses as L

B, BT = torch.rand(3), torch.rand(3, 5)
MASK, GROUPS = torch.ones(3, 5, dtype=torch.bool), torch.tensor([0, 3])
COLUMN = torch.rand(3, 1)
RATIOS = L.SelfRevisionLogRatios(*torch.rand(6, 3))

BAD = {
    "token_rewards: kl_estimator must be one of": lambda: L.token_rewards(
        B, BT, BT, MASK, kl_coef=0.1, kl_estimator="k4"
    ),
    r"token_rewards: rewards must have shape \(3,\)": lambda: L.token_rewards(
        COLUMN, BT, BT, MASK, kl_coef=0.1
    ),
    "token_rewards: ref_logps must have shape": lambda: L.token_rewards(
        B, BT, BT[:, 1:], MASK, kl_coef=0.1
    ),
    "token_rewards: mask must be bool": lambda: L.token_rewards(B, BT, BT, BT, kl_coef=0.1),
    "remax_advantages: greedy_rewards must have shape": lambda: L.remax_advantages(B, COLUMN),
    "remax_advantages: greedy_rewards must be on cpu": lambda: L.remax_advantages(B, B.to("meta")),
    "oreal_advantages: is_right must have shape": lambda: L.oreal_advantages(B, BT, COLUMN > 0),
    "keep_high_entropy: share must lie in": lambda: L.keep_high_entropy(B, BT, MASK, 0.0),
    "keep_high_entropy: advantages must have shape": lambda: L.keep_high_entropy(
        B[:2], BT, MASK, 0.2
    ),
    "token_covariances: mask must have shape": lambda: L.token_covariances(B, BT, MASK[:, 1:]),
    "drawn_covariances: share must lie in": lambda: L.clip_cov_advantages(B, BT, MASK, low=9),
    "drawn_covariances: spared must be bool": lambda: L.drawn_covariances(B, BT, MASK, spared=BT),
    "highest_covariances: share must lie in": lambda: L.kl_cov_penalty(B, BT, BT, MASK, share=2),
    "mask_off_policy_sequences: threshold must": lambda: L.mask_off_policy_sequences(
        B, BT, BT, MASK, threshold=-1
    ),
    "mask_off_policy_sequences: advantages must have": lambda: L.mask_off_policy_sequences(
        COLUMN, BT, BT, MASK, threshold=1
    ),
    "n_step_returns: values must have shape": lambda: L.n_step_returns(BT, B, MASK, num_steps=1),
    "n_step_returns: num_steps must be": lambda: L.n_step_returns(BT, BT, MASK, num_steps=0),
    "preference_loss: beta must be positive": lambda: L.dpo_loss(B, B, B, B, beta=-0.1),
    "inpo_loss: eta must be positive": lambda: L.inpo_loss(B, B, (B, B), (B, B), eta=0, tau=0),
    "inpo_loss: tau must lie in": lambda: L.inpo_loss(B, B, (B, B), (B, B), eta=1, tau=2),
    "xpo_loss: alpha must be": lambda: L.xpo_loss(B, B, B, B, B > 0, alpha=-1),
    "xpo_loss: chosen_is_from_ref must be bool": lambda: L.xpo_loss(B, B, B, B, B),
    "nash_md_loss: win_rates must have shape": lambda: L.nash_md_loss(B, B, COLUMN, tau=0.1),
    "srpo_loss: beta must be positive": lambda: L.srpo_loss(RATIOS, beta=0.0),
    "srpo_loss: alpha must lie in": lambda: L.srpo_loss(RATIOS, alpha=1.5),
    "srpo_loss: lose must have shape": lambda: L.srpo_loss(RATIOS._replace(lose=COLUMN)),
    "cpl_loss: bias must lie in": lambda: L.cpl_loss(B, B, bias=0),
    "lipo_loss: beta must be positive": lambda: L.lipo_loss(B, B, B, GROUPS, beta=float("nan")),
    "lipo_loss: ref_logps must have shape": lambda: L.lipo_loss(B, COLUMN, B, GROUPS),
    "rrhf_loss: lengths must have shape": lambda: L.rrhf_loss(B, COLUMN, B, GROUPS),
    "pro_loss: lengths must have shape": lambda: L.pro_loss(B, COLUMN, B, GROUPS),
    "treg_loss: alpha must be at least 0": lambda: L.treg_loss(
        torch.rand(2, 5), torch.rand(2, 5), torch.rand(2, 5), alpha=-1
    ),
    "smooth_labels: rate must lie in": lambda: L.smooth_labels(B, B, B, rate=2),
    "smooth_labels: targets must have shape": lambda: L.smooth_labels(COLUMN, B, B, rate=0.1),
    "contrastive_loss: temperature must be": lambda: L.contrastive_loss(BT, BT, temperature=0),
    "contrastive_loss: positives must have": lambda: L.contrastive_loss(BT, BT[:, 1:]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=f"{message}.*got .*;"):
        BAD[message]()
