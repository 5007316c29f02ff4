"""list_loss: every loss by hand, against float64 autograd, and its properties."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import list_loss, list_loss_ref
from rlhf_fast.ops.list_loss import LIST_LOSSES
from tests.ops.conftest import assert_as_accurate

SIZES = [1, 4, 2, 8, 3, 60, 1]
RANKINGS = ("plackett_luce", "list_mle", "pro")


def make(sizes=SIZES, device="cpu", seed=0, ties=True):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    scores = torch.randn(total, generator=generator)
    labels = torch.randint(0, 4, (total,), generator=generator).float()
    if not ties:
        labels = torch.randperm(total, generator=generator) / total
    cu_groups = torch.tensor([0, *sizes]).cumsum(0)
    return scores.to(device), labels.to(device), cu_groups.to(device)


def gradient(function, scores, *args, **kwargs):
    scores = scores.detach().clone().requires_grad_()
    loss = function(scores, *args, **kwargs)
    upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 1), device=loss.device, dtype=loss.dtype)
    return torch.autograd.grad((loss * upstream[: loss.numel()].view(loss.shape)).sum(), scores)[0]


def check(scores, *args, **kwargs):
    calls = ((list_loss, scores), (list_loss_ref, scores), (list_loss_ref, scores.double()))
    assert_as_accurate("loss", *(f(x, *args, **kwargs) for f, x in calls))
    assert_as_accurate("gradient", *(gradient(f, x, *args, **kwargs) for f, x in calls), factor=3.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", LIST_LOSSES)
def test_values_and_gradients_match_float64(device, loss_type, reduction):
    for ties in (True, False):
        check(*make(device=device, ties=ties), loss_type=loss_type, reduction=reduction)
    margin = 0.7 if loss_type == "pairwise_hinge" else 0.0
    settings = {"loss_type": loss_type, "margin": margin, "nll_weight": 0.3}
    check(*make(device=device), reduction=reduction, **settings)


# Scores 1, 3, 2 with labels 2, 1, 0: best first already; the scores' ranks are 3, 1, 2.
SP = lambda x: math.log1p(math.exp(x))  # noqa: E731
D = [1 / math.log(4), 1 / math.log(2), 1 / math.log(3)]
LSE = lambda *x: math.log(sum(map(math.exp, x)))  # noqa: E731
BY_HAND = {
    "pairwise_logistic": SP(2) + SP(1) + SP(-1),
    "pairwise_hinge": 2.0 + 1.0,
    "rrhf": 2.0 + 1.0,
    "lipo_lambda": (4 - 2) * abs(D[0] - D[1]) * SP(2)
    + (4 - 1) * abs(D[0] - D[2]) * SP(1)
    + (2 - 1) * abs(D[1] - D[2]) * SP(-1),
    "plackett_luce": LSE(1, 3, 2) - 1 + LSE(3, 2) - 3,
    "list_mle": LSE(1, 3, 2) - 1 + LSE(3, 2) - 3,
    "pro": LSE(1 * 2, 3 * 1, 2 * 2) - 1 * 2 + LSE(3 * 1, 2 * 1) - 3 * 1,
}


@pytest.mark.parametrize("loss_type", LIST_LOSSES)
def test_hand_computed(device, loss_type):
    args = [torch.tensor(x, device=device) for x in ([1.0, 3.0, 2.0], [2.0, 1.0, 0.0], [0, 3])]
    assert list_loss(*args, loss_type=loss_type).item() == pytest.approx(
        BY_HAND[loss_type], rel=1e-6
    )
    with_nll = list_loss(*args, loss_type=loss_type, nll_weight=0.5).item()
    assert with_nll == pytest.approx(BY_HAND[loss_type] - 0.5 * 1, rel=1e-6)


def test_two_items_are_a_pair(device):
    """Plackett-Luce and the logistic loss of two items are DPO's."""
    scores, labels, cu_groups = make([2] * 9, device, ties=False)
    losses = [
        list_loss(scores, labels, cu_groups, loss_type=name, reduction="none")
        for name in ("plackett_luce", "pairwise_logistic")
    ]
    torch.testing.assert_close(*losses)


def test_single_items_and_ties_cost_nothing(device):
    scores, _, cu_groups = make([1, 1, 3], device)
    labels = torch.ones_like(scores)
    for loss_type in set(LIST_LOSSES) - set(RANKINGS):
        assert (
            list_loss(scores, labels, cu_groups, loss_type=loss_type, reduction="none") == 0
        ).all()
    for loss_type in RANKINGS:
        losses = list_loss(scores, labels, cu_groups, loss_type=loss_type, reduction="none")
        assert (losses[:2] == 0).all()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    loss_type=st.sampled_from(LIST_LOSSES),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_order_within_a_group_does_not_matter(device, loss_type, sizes, seed):
    scores, labels, cu_groups = make(sizes, device, seed, ties=False)
    order = torch.cat(
        [torch.randperm(n) + begin for n, begin in zip(sizes, cu_groups.tolist())]
    ).to(device)
    kwargs = {"loss_type": loss_type, "reduction": "none"}
    first = list_loss(scores, labels, cu_groups, **kwargs)
    second = list_loss(scores[order], labels[order], cu_groups, **kwargs)
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", LIST_LOSSES)
def test_order_does_not_matter_where_scores_are_equal(device, loss_type):
    """As at the first step of training, where policy and reference are the same."""
    args = [torch.tensor(x, device=device) for x in ([0.5, 0.5, 0.5], [2.0, 0.0, 1.0], [0, 3])]
    first = list_loss(*args, loss_type=loss_type)
    assert torch.allclose(list_loss(args[0], args[1].flip(0), args[2], loss_type=loss_type), first)
    assert torch.allclose(list_loss_ref(*args, loss_type=loss_type), first)


def test_an_item_without_probability_comes_last(device):
    scores = torch.tensor([-torch.inf, 1.0, 2.0], device=device)
    labels = torch.tensor([0.0, 2.0, 1.0], device=device)
    grad = gradient(list_loss, scores, labels, torch.tensor([0, 3], device=device))
    want = (torch.tensor([1.0, 2.0]).softmax(0) - torch.tensor([1.0, 0.0])) / 2
    torch.testing.assert_close(grad[1:].cpu(), want)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(loss_type=st.sampled_from([n for n in LIST_LOSSES if n != "pro"]), shift=st.integers(-5, 5))
def test_a_shift_of_a_groups_scores_changes_nothing(device, loss_type, shift):
    scores, labels, cu_groups = make(device=device)
    first, second = (
        list_loss(x, labels, cu_groups, loss_type=loss_type) for x in (scores, scores + shift)
    )
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


def test_groups_do_not_touch_each_other(device):
    scores, labels, cu_groups = make(device=device)
    for loss_type in LIST_LOSSES:
        kwargs = {"loss_type": loss_type, "reduction": "none"}
        whole = list_loss(scores, labels, cu_groups, **kwargs)
        part = slice(*cu_groups[3:5].tolist())
        sizes = torch.tensor([0, SIZES[3]], device=device)
        alone = list_loss(scores[part], labels[part], sizes, **kwargs)
        torch.testing.assert_close(alone[0], whole[3])


def test_large_scores_stay_finite(device):
    scores = torch.tensor([1e4, -1e4, 0.0], device=device)
    labels = torch.tensor([0.0, 1.0, 2.0], device=device)
    for loss_type in LIST_LOSSES:
        args = (labels, torch.tensor([0, 3], device=device))
        assert gradient(list_loss, scores, *args, loss_type=loss_type).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores_are_computed_in_float32(device, dtype):
    scores, labels, cu_groups = make(device=device)
    assert list_loss(scores.to(dtype), labels, cu_groups).dtype == torch.float32
    assert gradient(list_loss, scores.to(dtype), labels, cu_groups).dtype == dtype


def test_no_groups_is_zero_and_connected(device):
    scores = torch.zeros(0, device=device, requires_grad=True)
    loss = list_loss(scores, torch.zeros(0, device=device), torch.zeros(1, device=device).int())
    loss.backward()
    assert loss == 0 and scores.grad.shape == (0,)


def test_repeatable_and_independent_of_threads(device):
    scores, labels, cu_groups = make([7] * 100, device)
    first = gradient(list_loss, scores, labels, cu_groups)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, gradient(list_loss, scores, labels, cu_groups))
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    scores, labels, cu_groups = make(device=device)
    torch.library.opcheck(
        torch.ops.rlhf_fast.list_loss_forward, (scores, labels, cu_groups, "pro", 0.0, 0.1, 1.0)
    )


def test_torch_compile_without_graph_breaks(device):
    def loss(scores, labels, cu_groups):
        return list_loss(scores * 2, labels, cu_groups, loss_type="lipo_lambda")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for sizes in ([3, 2], [4]):
        scores, labels, cu_groups = make(sizes, device)
        leaves = [scores.clone().requires_grad_() for _ in range(2)]
        compiled(leaves[0], labels, cu_groups).backward()
        loss(leaves[1], labels, cu_groups).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


BAD = {
    r"scores must have shape \[N\]": lambda s, y, g: list_loss(s[None], y, g),
    "scores must be float32": lambda s, y, g: list_loss(s.double(), y, g),
    r"labels must have shape \(3,\)": lambda s, y, g: list_loss(s, y[:2], g),
    "cu_groups must be int32": lambda s, y, g: list_loss(s, y, s),
    "cu_groups must be on": lambda s, y, g: list_loss(s, y, g.to("meta")),
    "without an empty group": lambda s, y, g: list_loss(s, y, torch.tensor([0, 2, 2, 3])),
    "cu_groups must rise from 0 to 0": lambda s, y, g: list_loss(s[:0], y[:0], g * 0),
    "cu_groups must rise from 0 to 3": lambda s, y, g: list_loss(s, y, torch.tensor([0, 2])),
    "loss_type must be one of": lambda s, y, g: list_loss(s, y, g, loss_type="lipo"),
    "reduction must be one of": lambda s, y, g: list_loss(s, y, g, reduction="avg"),
    "margin must be left out": lambda s, y, g: list_loss(s, y, g, margin=1.0),
    "nll_weight must be at least 0": lambda s, y, g: list_loss(s, y, g, nll_weight=-1.0),
    "labels must not be NaN": lambda s, y, g: list_loss(s, y * torch.nan, g),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    args = torch.rand(3), torch.rand(3), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="list_loss: .*got .*;"):
        BAD[message](*args)
    with pytest.raises(ValueError, match=message):
        BAD[message](*args)


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_list_loss as t\n"
        "for name in t.LIST_LOSSES: t.check(*t.make(), loss_type=name)\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
