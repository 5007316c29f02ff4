"""OpenRLHF's own PolicyLoss, ValueLoss and compute_approx_kl against the kernels."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf_fast.losses import token_rewards
from rlhf_fast.ops import PolicyLossParams, policy_loss, value_loss

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def theirs():
    """Its file of losses alone; what the package around it imports is not needed for them."""
    package = ModuleType("openrlhf_models")
    package.__path__ = [str(Path(find_spec("openrlhf").origin).parent / "models")]
    stand_ins = {package.__name__: package}
    if find_spec("deepspeed") is None:
        stand_ins["deepspeed"] = ModuleType("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("openrlhf_models.loss")


def make(spread=0.3):
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(6, 30, generator=generator)
    noise = spread * torch.randn(4, 6, 30, generator=generator)
    mask = torch.rand(6, 30, generator=generator) < 0.7
    return logps, logps + noise[0], noise[1] / spread, mask, logps + noise[2]


def compare(want, got, leaves):
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_level", [True, False])
def test_same_ppo(theirs, token_level, dual_clip):
    logps, old_logps, advantages, mask, _ = make()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    loss = theirs.PolicyLoss(0.2, 0.28, dual_clip, token_level)
    want, clip, kl, *_ = loss(leaves[0], old_logps, advantages, mask)
    params = PolicyLossParams(epsilon_high=0.28, dual_clip=dual_clip)
    loss_type = "ppo" if token_level else "grpo"
    got = policy_loss(
        leaves[1], old_logps, advantages, mask=mask, loss_type=loss_type, params=params
    )
    compare(want, got.loss, leaves)
    torch.testing.assert_close(got.metrics.clip_low + got.metrics.clip_high, clip)
    torch.testing.assert_close(got.metrics.old_kl_k1, kl)


def test_same_gspo(theirs):
    logps, old_logps, advantages, mask, _ = make()
    advantages = advantages[:, :1].expand_as(logps)
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    loss = theirs.PolicyLoss(policy_loss_type="gspo")
    want = loss(leaves[0], old_logps, advantages, mask)[0]
    got = policy_loss(leaves[1], old_logps, advantages, mask=mask, loss_type="gspo").loss
    compare(want, got, leaves)


@pytest.mark.parametrize(
    ("level", "mode", "ours"),
    [
        ("token", "clip", {"sampling_correction": "truncate"}),
        ("token", "mask", {"sampling_correction": "mask"}),
        ("seq", "mask", {"sampling_correction": "mask", "sampling_level": "sequence-gate"}),
    ],
)
def test_same_correction_for_the_sampler(theirs, level, mode, ours):
    logps, old_logps, advantages, mask, sampling_logps = make()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    loss = theirs.PolicyLoss(
        is_correction_level=level, is_correction_mode=mode, is_correction_threshold=[0.9, 1.3]
    )
    want = loss(leaves[0], old_logps, advantages, mask, sampling_logps)[0]
    params = PolicyLossParams(sampling_low=0.9, sampling_high=1.3, **ours)
    got = policy_loss(
        leaves[1], old_logps, advantages, mask=mask, sampling_logps=sampling_logps, params=params
    )
    compare(want, got.loss, leaves)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("token_level", [True, False])
def test_same_value_loss(theirs, token_level, clip):
    values, old_values, returns, mask, _ = make(1.0)
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    want = theirs.ValueLoss(clip, token_level)(leaves[0], old_values, returns, mask)
    want = want[0] if isinstance(want, tuple) else want
    aggregate = "token-mean" if token_level else "seq-mean-token-mean"
    kwargs = dict(old_values=old_values, clip=clip, mask=mask, aggregate=aggregate)
    compare(want, value_loss(leaves[1], returns, **kwargs).loss, leaves)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_same_kl(theirs, estimator, unbiased):
    utils = importlib.import_module("openrlhf_models.utils")
    logps, old_logps, _, mask, ref_logps = make(1.0)
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    kl = utils.compute_approx_kl(leaves[0], ref_logps, old_logps, estimator, unbiased)
    want = utils.masked_mean(kl, mask)
    params = PolicyLossParams(
        kl_coef=1.0,
        kl_estimator=estimator,
        kl_correction="weighted-straight-through" if unbiased else "none",
        kl_bound=10.0,
    )
    kwargs = dict(mask=mask, ref_logps=ref_logps, params=params)
    got = policy_loss(leaves[1], old_logps, torch.zeros(6), **kwargs).loss
    compare(want, got, leaves)


def test_same_token_rewards(theirs):
    utils = importlib.import_module("openrlhf_models.utils")
    logps, _, _, mask, ref_logps = make()
    kl = utils.compute_approx_kl(logps, ref_logps, kl_estimator="k1") * mask
    want = utils.compute_reward(torch.arange(6.0), 0.1, kl, mask)
    got = token_rewards(torch.arange(6.0), logps, ref_logps, mask, kl_coef=0.1)
    torch.testing.assert_close(got, want)
