"""verl's advantage estimators and policy losses, patched and not, found in its registries."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

from rlhf_fast.integrations import declining, verl

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
@pytest.mark.parametrize(
    "name",
    [
        "grpo", "grpo_vectorized", "gdpo", "rloo", "rloo_vectorized", "opo", "gpg",
        "reinforce_plus_plus_baseline",
    ],
)  # fmt: skip
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
    if name.startswith("g") and name != "gpg":
        arguments["norm_adv_by_std_in_grpo"] = by_std
    check_advantages(name, arguments)


def check_advantages(name, arguments):
    pairs = both(lambda: core_algos.get_adv_estimator_fn(name)(**arguments))
    for got, expected in zip(*pairs):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_of_the_best(by_std, caplog):
    b = batch()
    arguments = {
        "token_level_rewards": b.rewards,
        "response_mask": b.mask,
        "index": np.array(list("ababab")),
        "config": AlgoConfig(norm_adv_by_std_in_grpo=by_std),
    }
    check_advantages("grpo_passk", arguments)
    assert ("divided by the standard deviation" in caplog.text) is not by_std
    arguments["index"] = np.array(list("aaaabb"))
    check_advantages("grpo_passk", arguments)
    arguments["index"] = np.array(list("aaaaab"))
    for context in (contextlib.nullcontext(), verl.patch()):
        with context, pytest.raises(ValueError, match="at least 2 samples per group"):
            core_algos.get_adv_estimator_fn("grpo_passk")(**arguments)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_without_a_group(gamma):
    b = batch()
    arguments = {"config": AlgoConfig(gamma=gamma), "index": None}
    check_advantages(
        "reinforce_plus_plus",
        arguments | {"token_level_rewards": b.rewards, "response_mask": b.mask},
    )


def config(**options):
    given = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=2.0,
        policy_loss=PolicyLossConfig(
            clip_cov_ratio=0.1, clip_cov_lb=0.2, clip_cov_ub=5.0, kl_cov_ratio=0.2, ppo_kl_coef=2.0,
            dro_beta=0.5,
        ),
    )  # fmt: skip
    given.global_batch_info.update(options)
    return given


NAMES = (
    "vanilla", "cispo", "sapo", "gspo", "dppo_tv", "dppo_kl", "gpg", "dro", "clip_cov", "kl_cov",
    "geo_mean",
)  # fmt: skip
WHOLE = {"dp_size": 2, "batch_num_tokens": 91, "global_batch_size": 17, "loss_scale_factor": None}
MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)  # fmt: skip


def results(name, b, mode, info=None, weights=None):
    """Loss, gradient and metrics of whatever is registered under the name."""
    torch.manual_seed(0)  # clip_cov draws
    above = b.logps.max().clamp(min=0)  # dppo takes probabilities, which end at 1
    logps = (b.logps - above).requires_grad_()
    function = core_algos.get_policy_loss_fn(name)
    given = (b.old - above, logps, b.advantages, b.mask, mode, config(**info or {}), weights)
    loss, metrics = function(*given)
    loss.backward()
    return loss.detach(), logps.grad, metrics


def check(name, b, modes=("token-mean",), *args):
    pairs = both(lambda: [results(name, b, mode, *args) for mode in modes])
    for mode, got, expected in zip(modes, *pairs):
        for ours, theirs in zip(got[:2], expected):
            scale = max(theirs.abs().max().item(), 1.0)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * scale, msg=mode)
        near = {key: pytest.approx(v, rel=1e-4, abs=1e-6) for key, v in expected[2].items()}
        assert got[2] == near, mode


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("info", [{}, WHOLE], ids=["local", "whole batch"])
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["near", "far"])
def test_policy_losses(name, info, spread, caplog):
    check(name, batch(spread=spread), MODES, info)
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["ratios of e to the 30", "an empty row", "on policy"])
def test_policy_losses_on_adversarial_inputs(name, case):
    b = batch(spread=0.0 if case == "on policy" else 0.3)
    if case == "an empty row":
        b.mask[4] = 0
    elif case.startswith("ratios"):
        b.logps = b.old + 30.0 * (b.logps - b.old).sign()
    b.advantages = torch.tensor([-2.0, 3.0, 1.0, 0.0, 1e-3, -1e-3])[:, None] * b.mask
    check(name, b, MODES)


@pytest.mark.parametrize("name", NAMES)
def test_policy_losses_with_weights(name, caplog, monkeypatch):
    """Some are 0, as where verl masks by them; the tokens still count among the clipped."""
    monkeypatch.setattr(declining, "told", set())
    b, weights = batch(spread=1.0), 2 * torch.rand(ROWS, LENGTH)
    weights[:, ::2] = 0.0
    check(name, b, MODES[:1], WHOLE, weights)
    left = ["rollout_is_weights must be None" in text for text in caplog.messages]
    assert left == [True] * (name in ("dro", "geo_mean"))


def changed(**settings):
    """A configuration with other settings, which verl freezes."""
    found = config()
    for name, value in settings.items():
        owner = found.policy_loss if hasattr(found.policy_loss, name) else found
        object.__setattr__(owner, name, value)
    return found


@pytest.mark.parametrize("loss_type", ["reinforce", "ppo_clip"])
@pytest.mark.parametrize("correction", [None, "token"])
def test_bypass_mode(loss_type, correction):
    b = batch()

    def call():
        given = changed(rollout_correction={"loss_type": loss_type, "rollout_is": correction})
        logps = b.logps.clone().requires_grad_()
        function = core_algos.get_policy_loss_fn("bypass_mode")
        loss, metrics = function(b.old, logps, b.advantages, b.mask, "token-mean", given)
        loss.backward()
        return loss.detach(), logps.grad, metrics

    got, expected = both(call)
    for ours, theirs in zip(got[:2], expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert got[2] == {key: pytest.approx(v, rel=1e-4, abs=1e-6) for key, v in expected[2].items()}


@pytest.mark.parametrize(
    "name, settings, reason",
    [
        ("vanilla", {"clip_ratio_c": 1.2}, "dual_clip must exceed"),
        ("dppo_tv", {"clip_ratio_c": 1.2}, "dual_clip must exceed"),
        ("cispo", {"clip_ratio_low": 1.5}, "epsilon_low must lie in"),
        ("sapo", {"tau_pos": -1.0}, "sapo_temperature_pos must be positive"),
        ("geo_mean", {"clip_ratio_low": 1.5}, "epsilon_low must lie in"),
        ("clip_cov", {"clip_cov_ratio": 2.0}, "share must lie in"),
    ],
)
def test_settings_without_counterpart_stay_with_verl(name, settings, reason, caplog, monkeypatch):
    monkeypatch.setattr(declining, "told", set())
    b = batch()

    def call():
        torch.manual_seed(0)
        function = core_algos.get_policy_loss_fn(name)
        return function(b.old, b.logps, b.advantages, b.mask, "token-mean", changed(**settings))

    got, expected = both(call)
    assert torch.equal(got[0], expected[0]) and got[1] == expected[1]
    assert len(caplog.messages) == 1 and reason in caplog.text and f"loss_{name}" in caplog.text


def test_advantages_that_change_along_a_sequence_stay_with_verl_in_geo_mean(caplog, monkeypatch):
    monkeypatch.setattr(declining, "told", set())
    b = batch()
    b.advantages = b.rewards
    check("geo_mean", b)
    assert "the same all along a sequence" in caplog.text


def test_dro_without_its_setting_is_refused_by_verl():
    b = batch()
    for context in (contextlib.nullcontext(), verl.patch()):
        with context, pytest.raises(ValueError, match="dro_beta must be a positive value"):
            given = (b.old, b.logps, b.advantages, b.mask, "token-mean", changed(dro_beta=None))
            core_algos.get_policy_loss_fn("dro")(*given)


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


def test_undo_restores_the_registries():
    before = dict(core_algos.POLICY_LOSS_REGISTRY), dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    with verl.patch():
        mapped = {k for k, v in core_algos.POLICY_LOSS_REGISTRY.items() if v is not before[0][k]}
        assert mapped == {*NAMES}
        estimators = core_algos.ADV_ESTIMATOR_REGISTRY
        kept = {k for k, v in estimators.items() if v is before[1][k]}
        assert kept == {"gdpo", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"}
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is core_algos.compute_policy_loss_vanilla
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is not before[0]["vanilla"]
        assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is not before[1]["gae"]
    assert (core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY) == before
