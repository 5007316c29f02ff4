"""verl's advantage estimators and policy losses, patched and not, found in its registries."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config.actor import ActorConfig

from rlhf_fast.integrations import verl

pytestmark = pytest.mark.peers
ROWS, LENGTH = 6, 9


def batch(seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.ones(ROWS, LENGTH)
    mask[0, 5:] = 0
    mask[2, 2:4] = 0  # an observation in between
    mask[3, 1:] = 0
    old = -draw(ROWS, LENGTH).abs()
    return SimpleNamespace(
        rewards=draw(ROWS, LENGTH) * mask,
        values=draw(ROWS, LENGTH),
        mask=mask,
        old=old,
        logps=old + spread * draw(ROWS, LENGTH),
        advantages=draw(ROWS, 1).expand(ROWS, LENGTH) * mask,
    )


def both(call):
    expected = call()
    with verl.patch():
        got = call()
    return got, expected


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0)])
def test_gae(gamma, lam):
    b = batch()
    arguments = {
        "token_level_rewards": b.rewards,
        "values": b.values,
        "response_mask": b.mask,
        "gamma": gamma,
        "lam": lam,
    }
    name = core_algos.AdvantageEstimator.GAE
    pairs = both(lambda: core_algos.get_adv_estimator_fn(name)(**arguments))
    for got, expected in zip(*pairs):  # masked tokens count nowhere
        torch.testing.assert_close(got * b.mask, expected * b.mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", ["names", "numbers"])
@pytest.mark.parametrize("name", ["grpo", "rloo", "rloo_vectorized"])
@pytest.mark.parametrize("by_std", [True, False])
def test_group_advantages(name, index, by_std):
    b = batch()
    groups = {
        "names": np.array(list("abacab"), dtype=object),
        "numbers": np.array([2, 7, 2, 1, 2, 7]),
    }
    arguments = {
        "token_level_rewards": b.rewards,
        "response_mask": b.mask,
        "index": groups[index],
    }
    if name == "grpo":
        arguments["norm_adv_by_std_in_grpo"] = by_std
    pairs = both(lambda: core_algos.get_adv_estimator_fn(name)(**arguments))
    for got, expected in zip(*pairs):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


def config(**options):
    given = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.3,
    )  # fmt: skip
    given.global_batch_info.update(options)
    return given


WHOLE = {"dp_size": 2, "batch_num_tokens": 91, "global_batch_size": 17, "loss_scale_factor": None}
MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)  # fmt: skip


@pytest.mark.parametrize("name", ["vanilla", "cispo", "sapo", "gspo"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, WHOLE], ids=["local", "whole batch"])
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["near", "far"])
def test_policy_losses(name, mode, info, spread):
    b = batch(spread=spread)

    def call():
        logps = b.logps.clone().requires_grad_()
        function = core_algos.get_policy_loss_fn(name)
        loss, metrics = function(b.old, logps, b.advantages, b.mask, mode, config(**info))
        loss.backward()
        return function, loss.detach(), logps.grad, metrics

    got, expected = both(call)
    assert got[0] is not expected[0]
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-6)
    assert got[3].keys() == expected[3].keys()
    for key, value in expected[3].items():
        assert got[3][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", ["vanilla", "cispo", "sapo", "gspo"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["ratios of e to the 30", "an empty row", "on policy"])
def test_policy_losses_on_adversarial_inputs(name, mode, case):
    b = batch(spread=0.0 if case == "on policy" else 0.3)
    if case == "an empty row":
        b.mask[4] = 0
    elif case.startswith("ratios"):
        b.logps = b.old + 30.0 * (b.logps - b.old).sign()
    b.advantages = torch.tensor([-2.0, 3.0, 1.0, 0.0, 1e-3, -1e-3])[:, None] * b.mask

    def call():
        logps = b.logps.clone().requires_grad_()
        function = core_algos.get_policy_loss_fn(name)
        loss, metrics = function(b.old, logps, b.advantages, b.mask, mode, config())
        loss.backward()
        return loss.detach(), logps.grad, metrics

    got, expected = both(call)
    for ours, theirs in zip(got[:2], expected):
        scale = max(theirs.abs().max().item(), 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * scale)
    assert got[2] == {key: pytest.approx(v, rel=1e-4, abs=1e-6) for key, v in expected[2].items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, WHOLE], ids=["local", "whole batch"])
def test_value_loss(mode, info):
    b = batch()

    def call():
        values = b.logps.clone().requires_grad_()
        args = (b.rewards, b.values, b.mask, 0.2, mode)
        loss, clipped = core_algos.compute_value_loss(values, *args, **info)
        loss.backward()
        return loss.detach(), values.grad, clipped

    for got, expected in zip(*both(call)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_rollout_weights_stay_with_verl():
    b = batch()
    weights = torch.rand(ROWS, LENGTH)

    def call():
        function = core_algos.get_policy_loss_fn("vanilla")
        return function(b.old, b.logps, b.advantages, b.mask, "token-mean", config(), weights)[0]

    got, expected = both(call)
    assert torch.equal(got, expected)


def test_undo_restores_the_registries():
    before = dict(core_algos.POLICY_LOSS_REGISTRY), dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    with verl.patch():
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is core_algos.compute_policy_loss_vanilla
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is not before[0]["vanilla"]
        assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is not before[1]["gae"]
    assert (core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY) == before
