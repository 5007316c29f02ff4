"""linear_logps: values and gradients against float64, and what a head may come as."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlhf_fast.ops import head_weight, linear_logps, linear_logps_ref
from rlhf_fast.ops.logps_ref import DIFFERENTIABLE, OUTPUTS
from tests.ops.conftest import assert_as_accurate
from tests.ops.heads import check_against_float64, make
from tests.ops.logps_cases import SETTINGS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FROZEN = {
    "trainable": (),
    "frozen_head": ("weight", "bias"),
    "frozen_hidden": ("hidden",),
    "weight_only": ("hidden", "bias"),
}
BUDGETS = {"none": 0, "part": 70_000, "all": 1 << 30}


def as_function(function, outputs=("logps",), **kwargs):
    def run(problem):
        p = problem
        found = function(
            p.hidden, p.weight, p.labels, bias=p.bias, mask=p.mask, outputs=outputs, **kwargs
        )
        return {name: getattr(found, name) for name in outputs}

    return run


def check(problem, budget=0, outputs=("logps",), **kwargs):
    generator = torch.Generator().manual_seed(3)
    upstream = {
        name: torch.randn(problem.labels.shape, generator=generator)
        for name in outputs
        if name in DIFFERENTIABLE
    }
    upstream["logps"][..., ::3] = 0.0  # rows without a gradient, which are left out
    fused = as_function(linear_logps, outputs, logits_budget_bytes=budget, **kwargs)
    check_against_float64(
        problem, fused, as_function(linear_logps_ref, outputs, **kwargs), upstream
    )


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_matches_float64(hardware, frozen, dtype, masked, budget):
    for bias in (False, True):
        problem = make(dtype=dtype, masked=masked, bias=bias, frozen=frozen, device=hardware)
        check(problem, budget)
        check(problem, budget, ("entropy", "logps", "lse"))


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_float32_logits_of_16_bit_inputs(hardware, frozen, dtype, budget):
    """As accurate as a float32 head: a hundred times more than with logits of 16 bits."""
    problem = make(dtype=dtype, masked=True, bias=True, frozen=frozen, device=hardware)
    outputs = ("entropy", "logps", "lse")
    check(problem, budget, outputs, logits_dtype=torch.float32)
    exact = as_function(linear_logps_ref)(problem.leaves(torch.float64))["logps"]
    errors = [
        (as_function(linear_logps, logits_dtype=wider)(problem)["logps"] - exact).abs().max()
        for wider in (None, torch.float32)
    ]
    assert errors[1] < 0.01 * errors[0]


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_many_rows(hardware, frozen):
    """Enough for several chunks, and for a copy of the weight in another layout."""
    for budget in (0, 500 * 130 * 4, 1 << 30):
        check(make(1500, 130, frozen=frozen, device=hardware), budget, ("logps", "entropy"))


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "scaled", "softcap"])
def test_settings(device, settings):
    for frozen in FROZEN.values():
        problem = make(60, 130, frozen=frozen, device=device)
        check(problem, 10_000, ("logps", "entropy"), **settings)
    check(make(60, 130, device=device), outputs=OUTPUTS, **settings)


def test_temperature_per_row_and_batched_shapes(hardware):
    problem = make(num_rows=60, masked=True, device=hardware)
    problem.hidden = problem.hidden.view(4, 15, -1)
    problem.labels = problem.labels.view(4, 15).int()
    problem.mask = problem.mask.view(4, 15)
    temperature = torch.linspace(0.5, 2.0, 15, device=hardware)
    for frozen in FROZEN.values():
        problem.frozen = frozen
        check(problem, 0, ("logps", "entropy"), temperature=temperature)
        check(problem, 1 << 30, ("logps", "entropy"), temperature=temperature)


@pytest.mark.parametrize("vocab", [2, 9, 1031])
@pytest.mark.parametrize("width", [1, 7, 33])
def test_odd_sizes(hardware, vocab, width):
    for budget in (0, vocab * 4 * 10, 1 << 30):
        check(make(num_rows=37, vocab=vocab, width=width, device=hardware), budget)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_one_word_is_certain(hardware, frozen):
    """Recomputed logits may differ in the last bit, so gradients are 0 up to rounding."""
    for budget in (0, 400, 1 << 30):
        leaves = make(vocab=1, width=7, frozen=frozen, device=hardware).leaves()
        found = as_function(linear_logps, logits_budget_bytes=budget)(leaves)["logps"]
        assert (found == 0).all()
        found.sum().backward()
        assert all(g.abs().max() < 1e-4 for g in leaves.gradients().values())


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_without_live_rows_gradients_are_zero_but_connected(hardware, frozen):
    for num_rows in (0, 9):
        problem = make(num_rows, bias=True, device=hardware)
        problem.frozen = frozen
        problem.labels.fill_(-100)
        leaves = problem.leaves()
        (found,) = as_function(linear_logps)(leaves).values()
        assert found.shape == problem.labels.shape and (found == 0).all()
        found.sum().backward()
        gradients = leaves.gradients()
        assert set(gradients) == {"hidden", "weight", "bias"} - set(frozen)
        assert all((g == 0).all() for g in gradients.values())


def test_masked_rows_cost_nothing():
    """Their hidden states are not even looked at."""
    problem = make(masked=True)
    dead = ~problem.mask | (problem.labels == -100)
    problem.hidden[dead] = torch.nan
    leaves = problem.leaves()
    (found,) = as_function(linear_logps)(leaves).values()
    found.sum().backward()
    assert found.isfinite().all() and (found[dead] == 0).all() and (found[~dead] < 0).all()
    assert all(g.isfinite().all() for g in leaves.gradients().values())


def test_rows_with_zero_gradient_are_left_out_of_the_products():
    problem = make()
    for budget in BUDGETS.values():
        leaves = problem.leaves()
        found = as_function(linear_logps, logits_budget_bytes=budget)(leaves)["logps"]
        upstream = torch.where(torch.arange(300) % 3 == 1, 1.0, 0.0)
        only = upstream.bool()
        expected = replace(problem, hidden=problem.hidden[only], labels=problem.labels[only])
        expected = expected.leaves()
        as_function(linear_logps)(expected)["logps"].sum().backward()
        found.backward(upstream)
        torch.testing.assert_close(leaves.weight.grad, expected.weight.grad)
        torch.testing.assert_close(leaves.hidden.grad[only], expected.hidden.grad)
        assert (leaves.hidden.grad[~only] == 0).all()


def test_a_second_backward_is_refused_or_right():
    for budget, frozen in ((1 << 30, ()), (0, ()), (0, ("weight",))):
        leaves = make(frozen=frozen).leaves()
        loss = as_function(linear_logps, logits_budget_bytes=budget)(leaves)["logps"].sum()
        loss.backward(retain_graph=True)
        first = leaves.hidden.grad.clone()
        if budget:
            with pytest.raises(RuntimeError, match="linear_logps: backward must run once"):
                loss.backward()
        else:
            loss.backward()
            torch.testing.assert_close(leaves.hidden.grad, 2 * first)


def test_without_grad_nothing_is_prepared_for_backward(monkeypatch):
    monkeypatch.setattr(sys.modules[linear_logps.__module__], "forward_with_gradient", None)
    for frozen in FROZEN.values():
        with torch.no_grad():
            found = as_function(linear_logps)(make(frozen=frozen).leaves())["logps"]
        assert not found.requires_grad


def test_tied_weights():
    """The embedding is the head: both gradients meet in one tensor."""
    ids = torch.randint(50, (40,))
    weight = torch.randn(50, 16)

    def gradient(function, dtype):
        tied = weight.detach().clone().to(dtype).requires_grad_()
        function(tied[ids], tied, ids.roll(-1)).logps.sum().backward()
        return tied.grad

    triple = (
        gradient(linear_logps, torch.float32),
        gradient(linear_logps_ref, torch.float32),
        gradient(linear_logps_ref, torch.float64),
    )
    assert_as_accurate("tied weight", *triple, factor=3.0)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_autocast(frozen, budget):
    problem = make(bias=True, frozen=frozen)
    results = []
    for function in (linear_logps, linear_logps_ref):
        leaves = problem.leaves()
        kwargs = {"logits_budget_bytes": budget} if function is linear_logps else {}
        with torch.autocast("cpu", torch.bfloat16):
            found = as_function(function, **kwargs)(leaves)["logps"]
        found.sum().backward()
        results.append(({"logps": found}, leaves.gradients()))
    leaves = problem.leaves(torch.float64)
    found = as_function(linear_logps_ref)(leaves)["logps"]
    found.sum().backward()
    results.append(({"logps": found}, leaves.gradients()))
    for part in (0, 1):
        for name, got in results[0][part].items():
            assert got.dtype == torch.float32
            others = (run[part][name] for run in results[1:])
            assert_as_accurate(name, got, *others, factor=3.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen_head"])
def test_activation_checkpointing(frozen, use_reentrant):
    problem = make(frozen=frozen)
    gradients = []
    for checkpointed in (False, True):
        leaves = problem.leaves()

        def score(hidden, leaves=leaves):
            return linear_logps(hidden * 2, leaves.weight, leaves.labels).logps

        if checkpointed:
            logps = checkpoint(score, leaves.hidden, use_reentrant=use_reentrant)
        else:
            logps = score(leaves.hidden)
        logps.sum().backward()
        gradients.append(leaves.gradients())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


def test_changing_the_weight_before_backward_is_noticed():
    leaves = make().leaves()
    loss = as_function(linear_logps)(leaves)["logps"].sum()
    with torch.no_grad():
        leaves.weight += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_float32_precision_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    as_function(linear_logps)(make())
    assert torch.get_float32_matmul_precision() == before


BAD = {
    "hidden and weight must be float32": lambda h, w, y: linear_logps(h.double(), w, y),
    "hidden must have shape": lambda h, w, y: linear_logps(h[:, 1:], w, y),
    "gather a partitioned weight": lambda h, w, y: linear_logps(h, w[:0], y),
    "labels must be int32 or int64": lambda h, w, y: linear_logps(h, w, y.float()),
    "shift or reshape the labels": lambda h, w, y: linear_logps(h, w, y[1:]),
    "labels must lie in": lambda h, w, y: linear_logps(h, w, y + 300),
    "bias must have shape": lambda h, w, y: linear_logps(h, w, y, bias=w[:5, 0]),
    "mask must be bool": lambda h, w, y: linear_logps(h, w, y, mask=y),
    "temperature must be positive": lambda h, w, y: linear_logps(h, w, y, temperature=0.0),
    "temperatures must be one": lambda h, w, y: linear_logps(h, w, y, temperature=w[:3, 0]),
    "logits_dtype must be": lambda h, w, y: linear_logps(h, w, y, logits_dtype=torch.bfloat16),
    "softcap must be positive": lambda h, w, y: linear_logps(h, w, y, softcap=-1.0),
    "outputs must name some of": lambda h, w, y: linear_logps(h, w, y, outputs=("logp",)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    problem = make()
    with pytest.raises(ValueError, match="linear_logps: .*got .*;"):
        BAD[message](problem.hidden, problem.weight, problem.labels)
    with pytest.raises(ValueError, match=message):
        BAD[message](problem.hidden, problem.weight, problem.labels)


def test_an_ignored_label_may_be_any_number():
    problem = make()
    problem.labels[3] = 12345
    found = linear_logps(problem.hidden, problem.weight, problem.labels, ignore_index=12345)
    assert found.logps[3] == 0.0


def test_head_weight_refuses_an_adapter():
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(4, 9)

    model = Model()
    weight, bias = head_weight(model.lm_head)
    assert weight is model.lm_head.weight and bias is model.lm_head.bias
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="plain torch.nn.Linear, got peft.*merge the adapter"):
        head_weight(wrapped.base_model.model.lm_head)
    with pytest.raises(ValueError, match="plain torch.nn.Linear"):
        head_weight(torch.nn.Embedding(3, 4))
