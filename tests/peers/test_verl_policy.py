"""verl's own advantages, policy losses and value loss, called as they are, against the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.config import ActorConfig, PolicyLossConfig

from rlhf_fast.losses import (
    clip_cov_advantages,
    kl_cov_penalty,
    reinforce_plus_plus_advantages,
    remax_advantages,
)
from rlhf_fast.ops import (
    PolicyLossParams,
    gae,
    group_advantages,
    policy_loss,
    value_loss,
    whiten,
)

pytestmark = pytest.mark.peers

BATCH, LENGTH = 6, 30
AGGREGATIONS = [
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]


def config(**kwargs):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **kwargs)


def make(seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(BATCH, LENGTH, generator=generator)
    old_logps = logps + spread * torch.randn(BATCH, LENGTH, generator=generator)
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.7
    mask[-1] = False
    advantages = torch.randn(BATCH, 1, generator=generator).expand(BATCH, LENGTH)
    return logps, old_logps, advantages, mask


def both(theirs, name, loss_type, aggregation, their_config, params):
    logps, old_logps, advantages, mask = make()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    want, _ = theirs(
        old_logps, leaves[0], advantages, mask.float(), aggregation, config=their_config
    )
    want.backward()
    got = policy_loss(
        leaves[1], old_logps, advantages, mask=mask, loss_type=loss_type, params=params
    )
    got.loss.backward()
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo"])
def test_same_policy_loss(name, aggregation):
    theirs = core_algos.get_policy_loss_fn(name)
    params = PolicyLossParams(
        aggregation=aggregation,
        epsilon_low=0.1,
        epsilon_high=0.28,
        dual_clip=3.0 if name == "vanilla" else None,
    )
    # Its GSPO is the paper's GSPO-token.
    loss_type = {"vanilla": "ppo", "gspo": "gspo_token"}.get(name, name)
    their_config = config(clip_ratio_low=0.1, clip_ratio_high=0.28)
    both(theirs, name, loss_type, aggregation, their_config, params)


def test_same_sapo():
    params = PolicyLossParams(aggregation="seq-mean-token-mean")
    sapo = core_algos.get_policy_loss_fn("sapo")
    their_config = config(tau_pos=1.0, tau_neg=1.05)
    both(sapo, "sapo", "sapo", "seq-mean-token-mean", their_config, params)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:3])
@pytest.mark.parametrize("highest", [1.3, 20.0])
def test_same_dppo(name, aggregation, highest):
    """Some ratios reach `highest`, some divergences the bounds."""
    params = PolicyLossParams(
        aggregation=aggregation, epsilon_low=0.03, epsilon_high=0.05, dual_clip=highest
    )
    their_config = config(clip_ratio_low=0.03, clip_ratio_high=0.05, clip_ratio_c=highest)
    theirs = core_algos.get_policy_loss_fn(name)
    both(theirs, name, name, aggregation, their_config, params)


def test_same_gmpo():
    """Its mean is over all sequences, also those without a token: leave these out."""
    logps, old_logps, advantages, mask = (x[:-1] for x in make())
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    their_config = config(clip_ratio_low=0.4, clip_ratio_high=0.4)
    theirs = core_algos.get_policy_loss_fn("geo_mean")
    want, _ = theirs(old_logps, leaves[0], advantages, mask.float(), config=their_config)
    want.backward()
    params = PolicyLossParams(epsilon_low=0.4, epsilon_high=0.4)
    out = policy_loss(leaves[1], old_logps, advantages, mask=mask, loss_type="gmpo", params=params)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def of_tokens(name, loss, **settings):
    """verl's loss of that name against `loss`, both of log-probs."""
    logps, old_logps, advantages, mask = make()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    theirs = core_algos.get_policy_loss_fn(name)
    their_config = config(policy_loss=PolicyLossConfig(loss_mode=name, **settings))
    want, _ = theirs(old_logps, leaves[0], advantages, mask.float(), config=their_config)
    want.backward()
    got = loss(leaves[1], old_logps, advantages[:, 0], mask)
    got.backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-7, msg=name)
    return got, want


def test_same_dro():
    params = PolicyLossParams(dro_beta=0.5)
    ours = lambda *x: policy_loss(*x[:3], mask=x[3], loss_type="dro", params=params).loss  # noqa: E731
    torch.testing.assert_close(*of_tokens("dro", ours, dro_beta=0.5))


def test_same_kl_cov():
    params = PolicyLossParams(epsilon_low=1.0, epsilon_high=1e6)

    def ours(logps, old_logps, advantages, mask):
        unclipped = policy_loss(logps, old_logps, advantages, mask=mask, params=params).loss
        return unclipped + kl_cov_penalty(advantages, logps, old_logps, mask, share=0.1, coef=2.0)

    torch.testing.assert_close(*of_tokens("kl_cov", ours, kl_cov_ratio=0.1, ppo_kl_coef=2.0))


def test_same_gradient_of_clip_cov():
    """All candidates are dropped, so that none is drawn; in value they count otherwise there."""

    def ours(logps, old_logps, advantages, mask):
        kept = clip_cov_advantages(advantages, logps, mask, share=1.0, low=0.1, high=9.0)
        return policy_loss(logps, old_logps, kept, mask=mask).loss

    of_tokens("clip_cov", ours, clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=9.0)


def test_same_advantages_without_a_group():
    rewards, _, _, mask = make()
    rewards = rewards * mask
    theirs = core_algos.get_adv_estimator_fn("reinforce_plus_plus")
    want, _ = theirs(rewards.clone(), mask.float(), config=AlgoConfig(gamma=0.97))
    got = reinforce_plus_plus_advantages(rewards, mask, gamma=0.97)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=1e-5)
    greedy = torch.arange(float(BATCH))
    want, _ = core_algos.get_adv_estimator_fn("remax")(rewards.clone(), greedy, mask.float())
    got = remax_advantages(rewards.sum(1), greedy)[:, None].expand_as(mask)
    first = mask & (mask.cumsum(1) == 1)  # there, all of a response's rewards are still to come
    torch.testing.assert_close(got[first], want[first])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k3+"])
def test_same_kl_penalty(kind):
    logps, ref_logps, _, _ = make(spread=1.0)
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    want = core_algos.kl_penalty(leaves[0], ref_logps, kind).mean()
    want.backward()
    params = PolicyLossParams(
        kl_coef=1.0,
        kl_estimator=kind[:2],
        kl_correction="straight-through" if kind.endswith("+") else "none",
        kl_bound=10.0,
    )
    zeros = torch.zeros(BATCH)
    got = policy_loss(leaves[1], None, zeros, ref_logps=ref_logps, params=params).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_same_value_loss(aggregation):
    values, old_values, returns, mask = make(spread=1.0)
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    want, clip_fraction = core_algos.compute_value_loss(
        leaves[0], returns, old_values, mask.float(), 0.2, aggregation
    )
    want.backward()
    got = value_loss(
        leaves[1], returns, old_values=old_values, clip=0.2, mask=mask, aggregate=aggregation
    )
    got.loss.backward()
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.metrics.clip_fraction, clip_fraction)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_same_gae_and_whitening():
    rewards, values, _, mask = make(spread=1.0)
    want = core_algos.compute_gae_advantage_return(rewards, values, mask.float(), 0.99, 0.95)
    got = gae(rewards, values, gamma=0.99, lam=0.95, mask=mask)
    advantages = whiten(got.advantages, mask)
    torch.testing.assert_close(got.returns[mask], want[1][mask])
    torch.testing.assert_close(advantages[mask], want[0][mask], rtol=1e-4, atol=1e-5)
    for shift_mean in (True, False):
        want = torch_functional.masked_whiten(rewards, mask.float(), shift_mean)
        got = whiten(rewards, mask, shift_mean=shift_mean)
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)


GROUPS = np.array([7, 7, 3, 7, 3, 5])


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("grpo", "grpo"),
        ("grpo_unscaled", "dr_grpo"),
        ("rloo", "rloo"),
        ("opo", "opo"),
        ("grpo_passk", "best"),
    ],
)
def test_same_group_advantages(name, estimator):
    rewards, _, _, mask = make()
    rewards, mask = rewards.clone(), torch.ones_like(mask)
    mask[2:, 20:] = False
    groups = GROUPS if name != "grpo_passk" else np.array([7, 7, 3, 7, 3, 3])
    kwargs = {"norm_adv_by_std_in_grpo": False} if name == "grpo_unscaled" else {}
    theirs = core_algos.get_adv_estimator_fn(name.replace("_unscaled", ""))
    want, _ = theirs(
        token_level_rewards=rewards * mask, response_mask=mask.float(), index=groups,
        config=AlgoConfig(), **kwargs,
    )  # fmt: skip
    got = group_advantages(
        (rewards * mask).sum(1),
        estimator=estimator,
        group_ids=torch.from_numpy(groups),
        lengths=mask.sum(1) if estimator == "opo" else None,
        keep_single=True,
    )
    torch.testing.assert_close(got, want[:, 0], rtol=1e-4, atol=1e-5)
