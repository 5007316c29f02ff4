"""reward_model_loss and reward_regression_loss: by hand, against float64, and their properties."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from rlhf_fast.ops import (
    reward_model_loss,
    reward_model_loss_ref,
    reward_regression_loss,
    reward_regression_loss_ref,
)
from rlhf_fast.ops.reward_model_loss import REWARD_LOSSES
from tests.ops.conftest import assert_as_accurate

SIZE = (37, 5)


def make(loss_type, device="cpu", masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(SIZE, generator=generator) * 2
    targets = torch.randn(SIZE, generator=generator)
    kwargs = {"loss_type": loss_type}
    if loss_type == "binary":
        targets = targets.sigmoid()
    if loss_type == "quantile":
        kwargs["levels"] = torch.linspace(0.1, 0.9, SIZE[1]).to(device)
        targets = targets[:, 0].contiguous()
    if masked:
        kwargs["mask"] = (torch.rand(SIZE, generator=generator) < 0.6).to(device)
    return predictions.to(device), targets.to(device), kwargs


def gradient(function, predictions, *args, **kwargs):
    predictions = predictions.detach().clone().requires_grad_()
    loss = function(predictions, *args, **kwargs)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), device=loss.device, dtype=loss.dtype)
    return torch.autograd.grad((loss * upstream.view(loss.shape)).sum(), predictions)[0]


def check(predictions, targets, **kwargs):
    calls = (
        (reward_regression_loss, predictions),
        (reward_regression_loss_ref, predictions),
        (reward_regression_loss_ref, predictions.double()),
    )
    assert_as_accurate("loss", *(f(x, targets, **kwargs) for f, x in calls))
    grads = (gradient(f, x, targets, **kwargs) for f, x in calls)
    assert_as_accurate("gradient", *grads, factor=3.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("loss_type", REWARD_LOSSES)
def test_regression_matches_float64(device, loss_type, masked, reduction):
    predictions, targets, kwargs = make(loss_type, device, masked)
    check(predictions, targets, reduction=reduction, **kwargs)


BY_HAND = {
    "squared": [[1.0, 4.0], [0.25, 0.0]],
    "huber": [[0.5, 1.5], [0.125, 0.0]],
    "quantile": [[0.9, 0.4], [0.05, 0.0]],
    "binary": [
        [math.log(2), math.log1p(math.e**3) - 3],
        [math.log1p(math.e**0.5), math.log(2)],
    ],
}


@pytest.mark.parametrize("loss_type", REWARD_LOSSES)
def test_regression_by_hand(device, loss_type):
    predictions = torch.tensor([[0.0, 3.0], [0.5, 0.0]], device=device)
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=device)
    levels = torch.tensor([0.9, 0.8], device=device) if loss_type == "quantile" else None
    got = reward_regression_loss(
        predictions, targets, loss_type=loss_type, levels=levels, reduction="none"
    )
    torch.testing.assert_close(got, torch.tensor(BY_HAND[loss_type], device=device))


def test_unknown_ratings_are_not_looked_at(device):
    predictions, targets, kwargs = make("squared", device)
    targets[~kwargs["mask"]] = torch.nan
    grad = gradient(reward_regression_loss, predictions, targets, **kwargs)
    assert grad.isfinite().all() and (grad[~kwargs["mask"]] == 0).all()
    kwargs["mask"] = torch.zeros_like(kwargs["mask"])
    assert reward_regression_loss(predictions, targets, **kwargs) == 0
    assert (gradient(reward_regression_loss, predictions, targets, **kwargs) == 0).all()


def test_quantile_heads_find_the_quantiles(device):
    targets = torch.linspace(0, 1, 1001, device=device)
    levels = torch.tensor([0.1, 0.5, 0.9], device=device)
    kwargs = {"loss_type": "quantile", "levels": levels}
    prediction = levels.expand(1001, 3)
    best = reward_regression_loss(prediction, targets, **kwargs)
    for shift in (-0.05, 0.05):
        assert reward_regression_loss(prediction + shift, targets, **kwargs) > best


def test_pairs_match_float64_and_by_hand(device):
    rewards = torch.randn(2, 40, device=device)
    random = torch.rand(2, 40, device=device)
    for kwargs in (
        {},
        {"margins": random[0]},
        {"targets": random[1], "label_smoothing": 0.1, "center_weight": 0.01},
    ):
        calls = (
            (reward_model_loss, rewards),
            (reward_model_loss_ref, rewards),
            (reward_model_loss_ref, rewards.double()),
        )
        assert_as_accurate("loss", *(f(*x, **kwargs).loss for f, x in calls))
    one = [torch.tensor([x], device=device) for x in (2.0, 1.5)]
    out = reward_model_loss(*one, margins=torch.tensor([0.2], device=device), center_weight=0.1)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.3)) + 0.1 * 3.5**2, rel=1e-6)
    assert out.accuracies.item() == 1.0 and out.chosen_rewards.item() == 2.0


def test_pairs_agree_with_logsigmoid_and_its_gradient(device):
    chosen, rejected = torch.randn(2, 8, device=device)
    leaves = [chosen.clone().requires_grad_() for _ in range(2)]
    reward_model_loss(leaves[0], rejected).loss.backward()
    (-F.logsigmoid(leaves[1] - rejected).mean()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_predictions_are_computed_in_float32(device, dtype):
    predictions, targets, kwargs = make("squared", device)
    assert reward_regression_loss(predictions.to(dtype), targets, **kwargs).dtype == torch.float32
    grad = gradient(reward_regression_loss, predictions.to(dtype), targets, **kwargs)
    assert grad.dtype == dtype


def test_empty_batch_is_zero_and_connected(device):
    predictions = torch.zeros(0, 3, device=device, requires_grad=True)
    loss = reward_regression_loss(predictions, torch.zeros(0, 3, device=device))
    loss.backward()
    assert loss == 0 and predictions.grad.shape == (0, 3)


def test_repeatable_and_independent_of_threads(device):
    predictions, targets = torch.randn(2, 3000, 3, device=device)
    first = reward_regression_loss(predictions, targets)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, reward_regression_loss(predictions, targets))
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    for loss_type in ("quantile", "squared"):
        predictions, targets, kwargs = make(loss_type, device)
        args = (kwargs["mask"], kwargs.get("levels"), loss_type, 1.0, True)
        torch.library.opcheck(
            torch.ops.rlhf_fast.reward_regression_loss_forward, (predictions, targets, *args)
        )


def test_torch_compile_without_graph_breaks(device):
    def loss(predictions, targets, mask):
        return reward_regression_loss(predictions * 2, targets, mask=mask, loss_type="huber")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    predictions, targets, kwargs = make("huber", device)
    for n in (6, 4):
        args = (targets[:n], kwargs["mask"][:n])
        leaves = [predictions[:n].clone().requires_grad_() for _ in range(2)]
        compiled(leaves[0], *args).backward()
        loss(leaves[1], *args).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


R = reward_regression_loss
BAD = {
    r"predictions must have shape \[B, K\]": lambda p, t: R(p[0], t),
    "predictions must be float32": lambda p, t: R(p.double(), t),
    r"targets must have shape \(4, 3\)": lambda p, t: R(p, t[:2]),
    "targets must be on": lambda p, t: R(p, t.to("meta")),
    "loss_type must be one of": lambda p, t: R(p, t, loss_type="mse"),
    "reduction must be one of": lambda p, t: R(p, t, reduction="avg"),
    "mask must be bool": lambda p, t: R(p, t, mask=p),
    "levels must be given": lambda p, t: R(p, t, loss_type="quantile"),
    "levels must be left out": lambda p, t: R(p, t, levels=p[0]),
    r"levels must have shape \(3,\)": lambda p, t: R(p, t, loss_type="quantile", levels=p[0, :2]),
    r"levels must lie in \(0, 1\)": lambda p, t: R(
        p, t, loss_type="quantile", levels=torch.tensor([0.1, 0.5, 1.0])
    ),
    "delta must be positive": lambda p, t: R(p, t, loss_type="huber", delta=0.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    predictions, targets = torch.rand(2, 4, 3)
    with pytest.raises(ValueError, match="reward_regression_loss: .*got .*;"):
        BAD[message](predictions, targets)
    with pytest.raises(ValueError, match=message):
        BAD[message](predictions, targets)


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_reward_model_loss as t\n"
        "for name in t.REWARD_LOSSES:\n"
        "  predictions, targets, kwargs = t.make(name)\n"
        "  t.check(predictions, targets, **kwargs)\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
