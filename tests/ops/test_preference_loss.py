"""preference_loss: every loss by hand and against float64 autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from rlhf_fast.ops import (
    PREFERENCE_LOSSES,
    PairData,
    PreferenceParams,
    preference_loss,
    preference_loss_ref,
    unpaired_preference_loss,
    unpaired_preference_loss_ref,
)
from rlhf_fast.ops.preference_inputs import DIVERGENCES, TRAITS
from tests.ops.conftest import assert_as_accurate

UNPAIRED = [name for name in TRAITS if "unpaired" in TRAITS[name]]


def make(loss_type, num_pairs=37, device="cpu", seed=0, scale=1.0):
    """Log-probs of sequences of 1 to 200 tokens and, where the loss wants one, a reference."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 200, (2, num_pairs), generator=generator)
    logps = -torch.rand(2, num_pairs, generator=generator) * lengths * 2 * scale
    reference = logps + torch.randn(2, num_pairs, generator=generator) * 5 * scale
    if loss_type == "orpo":
        logps[:, 0] = -1e-3  # nearly certain
    tensors = [*logps, *reference] if "reference" in TRAITS[loss_type] else [*logps]
    extras = {}
    if "lengths" in TRAITS[loss_type]:
        extras = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    return [t.to(device) for t in tensors], PairData(
        **{name: t.to(device) for name, t in extras.items()}
    )


def settings_of(loss_type, device="cpu", num_pairs=37):
    """Keyword arguments that switch on everything that a loss knows."""
    traits = TRAITS[loss_type]
    tensors, data = make(loss_type, num_pairs, device)
    random = torch.rand(3, num_pairs, generator=torch.Generator().manual_seed(3)).to(device)
    if "sorted" not in traits:
        data = data._replace(weights=random[0])
        if data.chosen_lengths is None:
            data = data._replace(chosen_lengths=torch.full((num_pairs,), 7, device=device))
    if "margin" in traits and "sorted" not in traits:
        data = data._replace(margins=random[1])
    if "targets" in traits:
        data = data._replace(targets=random[2])
    if "baseline" in traits:
        data = data._replace(baseline=torch.tensor(0.7, device=device))
    params = PreferenceParams(
        label_smoothing=0.1 if "smoothing" in traits else 0.0,
        margin=0.3 if "margin" in traits else 0.0,
        nll_weight=0.0 if "sorted" in traits else 0.2,
        center_weight=0.0 if "sorted" in traits else 0.01,
        chosen_weight=1.5 if "unpaired" in traits else 1.0,
        rejected_weight=0.5 if "unpaired" in traits else 1.0,
        dpop_penalty=3.0 if loss_type == "dpop" else 0.0,
    )
    return tensors, {"loss_type": loss_type, "data": data, "params": params}


def plain_params(loss_type):
    return PreferenceParams(label_smoothing=0.1 if loss_type == "exo_pair" else 0.0)


def gradient(function, tensors, **kwargs):
    halves = [t.detach().clone().requires_grad_() for t in tensors[:2]]
    out = function(*halves, *tensors[2:], **kwargs)
    upstream = torch.linspace(0.5, 2.0, max(out.loss.numel(), 1), dtype=out.loss.dtype)
    loss = (out.loss * upstream.to(out.loss.device)[: out.loss.numel()].view(out.loss.shape)).sum()
    grads = torch.autograd.grad(loss, halves, allow_unused=True)
    return [torch.zeros_like(h) if g is None else g for g, h in zip(grads, halves)]


def check(tensors, **kwargs):
    doubles = [t.double() for t in tensors]
    got = preference_loss(*tensors, **kwargs)
    plain, truth = (preference_loss_ref(*t, **kwargs) for t in (tensors, doubles))
    for name in got._fields:
        assert_as_accurate(name, *(getattr(o, name) for o in (got, plain, truth)))
    triple = (
        gradient(f, t, **kwargs)
        for f, t in (
            (preference_loss, tensors),
            (preference_loss_ref, tensors),
            (preference_loss_ref, doubles),
        )
    )
    for name, *grads in zip(("chosen", "rejected"), *triple):
        assert_as_accurate(f"gradient of {name}", *grads, factor=3.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_values_and_gradients_match_float64(device, loss_type, reduction):
    tensors, data = make(loss_type, device=device)
    check(
        tensors,
        loss_type=loss_type,
        data=data,
        params=plain_params(loss_type),
        reduction=reduction,
    )
    tensors, kwargs = settings_of(loss_type, device)
    check(tensors, beta=0.3, reduction=reduction, **kwargs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", [n for n in TRAITS if "divergence" in TRAITS[n]])
def test_divergences_match_float64(device, loss_type, divergence):
    tensors, data = make(loss_type, device=device, scale=0.3)
    e = 0.1 if loss_type == "exo_pair" else 0.0
    params = PreferenceParams(f_divergence=divergence, alpha=0.4, label_smoothing=e)
    check(tensors, loss_type=loss_type, data=data, params=params, reduction="none")


@pytest.mark.parametrize("loss_type", UNPAIRED)
def test_single_responses_match_float64_and_the_parts_of_pairs(device, loss_type):
    (chosen, rejected, *references), kwargs = settings_of(loss_type, device)
    data = kwargs["data"]._replace(chosen_lengths=None, weights=None)
    params = PreferenceParams(chosen_weight=1.5, rejected_weight=0.5)
    kwargs = {"loss_type": loss_type, "data": data, "params": params, "reduction": "none"}
    pairs = preference_loss(chosen, rejected, *references, **kwargs)
    yes = torch.ones(len(chosen), dtype=torch.bool, device=device)
    parts = [
        unpaired_preference_loss(logps, is_chosen, reference, **kwargs)
        for logps, is_chosen, reference in zip((chosen, rejected), (yes, ~yes), references)
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, pairs.loss)
    assert torch.equal(parts[1].chosen_rewards, pairs.rejected_rewards)
    assert (parts[0].accuracies == (pairs.chosen_rewards > 0)).all()

    mixed = torch.arange(len(chosen), device=device) % 3 == 0
    got, plain, truth = (
        f(chosen.to(dtype), mixed, references[0], **kwargs)
        for f, dtype in (
            (unpaired_preference_loss, torch.float32),
            (unpaired_preference_loss_ref, torch.float32),
            (unpaired_preference_loss_ref, torch.float64),
        )
    )  # fmt: skip
    for name in got._fields:
        assert_as_accurate(name, *(getattr(o, name) for o in (got, plain, truth)))
    leaves = [chosen.detach().clone().requires_grad_() for _ in range(2)]
    for leaf, f in zip(leaves, (unpaired_preference_loss, unpaired_preference_loss_ref)):
        f(leaf, mixed, references[0], **{**kwargs, "reduction": "mean"}).loss.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


# One pair: log-probs -1 and -3, reference -2 and -2.5, so c = 1, r = -0.5; beta = 0.5, so h = 0.75.
# Lengths 2 and 4. Each value written out from its formula.
S = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
LOG_ODDS = lambda x: math.log(math.exp(x) / (1 - math.exp(x)))  # noqa: E731
BY_HAND = {
    "sigmoid": math.log1p(math.exp(-0.75)),
    "sigmoid_norm": math.log1p(math.exp(-0.5 * (0.5 + 0.125))),
    "robust": -math.log(S(0.75)),
    "hinge": 0.25,
    "ipo": (0.625 - 1) ** 2,
    "ipo_sum": (1.5 - 1) ** 2,
    "exo_pair": S(0.75) * math.log(S(0.75) / 0.9) + S(-0.75) * math.log(S(-0.75) / 0.1),
    "nca_pair": -math.log(S(0.5)) - 0.5 * math.log(S(-0.5)) - 0.5 * math.log(S(0.25)),
    "bco_pair": -math.log(S(0.5)) - math.log(S(0.25)),
    "sppo_hard": (1 - 1) ** 2 + (-0.5 + 1) ** 2,
    "aot": math.log1p(math.exp(-0.75)),
    "aot_unpaired": math.log1p(math.exp(-0.75)),
    "apo_zero": (1 - S(0.5)) + S(-0.25),
    "apo_down": S(0.5) + (1 - S(0.75)),
    "discopop": (1 - S(15)) * math.log1p(math.exp(-0.75)) + S(15) * math.exp(-0.75),
    "dpop": math.log1p(math.exp(-0.75)),
    "cal_dpo": math.log1p(math.exp(-1.5)) + (1 - 1) ** 2 + (-0.5 + 1) ** 2,
    "kto": (1 - S(0.5)) + (1 - S(0.25)),
    "cpo": math.log1p(math.exp(-1.0)),
    "simpo": math.log1p(math.exp(-0.5 * (-0.5 + 0.75))),
    "slic": 0.0,
    "orpo": 0.5 * math.log1p(math.exp(LOG_ODDS(-0.75) - LOG_ODDS(-0.5))),
    "sft": 0.5,
    "bradley_terry": math.log1p(math.exp(-1.0)),
}


def test_every_loss_has_a_hand_computed_value():
    assert set(BY_HAND) == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_hand_computed(device, loss_type):
    tensors = [torch.tensor([x], device=device) for x in (-1.0, -3.0, -2.0, -2.5)]
    lengths = [torch.tensor([x], device=device) for x in (2, 4)]
    out = preference_loss(
        *tensors[: 4 if "reference" in TRAITS[loss_type] else 2],
        loss_type=loss_type,
        beta=0.5,
        params=plain_params(loss_type),
        data=PairData(*lengths) if "lengths" in TRAITS[loss_type] else PairData(),
    )
    assert out.loss.item() == pytest.approx(BY_HAND[loss_type], rel=1e-6, abs=1e-7)
    if "reference" in TRAITS[loss_type]:
        assert out.chosen_rewards.item() == 0.5 and out.rejected_rewards.item() == -0.25
        assert out.means.tolist() == [0.5, -0.25, 1.0, 0.75]


@pytest.mark.parametrize(
    ("loss_type", "params", "data", "want"),
    [
        ("sigmoid", {"label_smoothing": 0.1}, {},
         -0.9 * math.log(S(0.75)) - 0.1 * math.log(S(-0.75))),
        ("robust", {"label_smoothing": 0.1}, {},
         (-0.9 * math.log(S(0.75)) + 0.1 * math.log(S(-0.75))) / 0.8),
        ("sigmoid", {"margin": 0.25}, {"margins": 0.5}, math.log(2)),
        ("sigmoid", {}, {"targets": 0.3}, -0.3 * math.log(S(0.75)) - 0.7 * math.log(S(-0.75))),
        ("sigmoid", {}, {"weights": 0.0}, 0.0),
        ("sigmoid", {"nll_weight": 0.5}, {"chosen_lengths": 2.0}, -math.log(S(0.75)) + 0.25),
        ("ipo_sum", {}, {"targets": 0.5}, 1.5**2),
        ("sppo_hard", {}, {"targets": 0.75}, (1 - 0.5) ** 2 + (-0.5 + 0.5) ** 2),
        ("bco_pair", {}, {"baseline": 1.0}, math.log(2) + math.log1p(math.exp(-0.75))),
        ("kto", {"chosen_weight": 2.0}, {"baseline": 1.0}, 2 * 0.5 + 1 - S(0.75)),
        ("dpop", {"dpop_penalty": 9.0}, {}, math.log1p(math.exp(-0.75))),
        ("sigmoid", {"f_divergence": "forward_kl"}, {},
         -math.log(S(0.5 * ((1 - math.exp(-1)) - (1 - math.exp(0.5)))))),
        ("sigmoid", {"f_divergence": "js_divergence"}, {},
         -math.log(S(0.5 * (math.log(S(1)) - math.log(S(-0.5)))))),
        ("sigmoid", {"f_divergence": "alpha_divergence", "alpha": 0.5}, {},
         -math.log(S(0.5 * ((math.exp(-0.5) - 1) / -0.5 - (math.exp(0.25) - 1) / -0.5)))),
    ],
)  # fmt: skip
def test_settings_by_hand(device, loss_type, params, data, want):
    tensors = [torch.tensor([x], device=device) for x in (-1.0, -3.0, -2.0, -2.5)]
    data = {
        name: torch.tensor(x if name == "baseline" else [x], device=device)
        for name, x in data.items()
    }
    out = preference_loss(
        *tensors,
        loss_type=loss_type,
        beta=0.5,
        params=PreferenceParams(**params),
        data=PairData(**data),
    )
    assert out.loss.item() == pytest.approx(want, rel=1e-6)


def test_dpop_punishes_a_chosen_response_below_its_reference(device):
    tensors = [torch.tensor([x], device=device) for x in (-2.0, -4.0, -1.0, -1.0)]
    params = PreferenceParams(dpop_penalty=3.0)
    out = preference_loss(*tensors, loss_type="dpop", beta=0.5, params=params)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * (2 - 3 * 1))), rel=1e-6)


def test_labels_of_single_responses_may_lie_apart(device):
    for count in (8, 500):
        logps, ref_logps = torch.randn(2, count, device=device)
        labels = (torch.rand(count, 3, device=device) > 0.5)[:, 1]
        apart, dense = (
            unpaired_preference_loss(logps, is_chosen, ref_logps, reduction="none")
            for is_chosen in (labels, labels.contiguous())
        )
        assert torch.equal(apart.loss, dense.loss)
        assert torch.equal(apart.accuracies, dense.accuracies)


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_preference_loss as t\n"
        "for loss_type in t.PREFERENCE_LOSSES:\n"
        "  tensors, kwargs = t.settings_of(loss_type)\n"
        "  t.check(tensors, **kwargs)\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
