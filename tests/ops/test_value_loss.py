"""value_loss: CPU and CUDA kernels (emulated, or real with a GPU) against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import value_loss, value_loss_ref
from rlhf_fast.ops.aggregation import AGGREGATIONS
from tests.ops.conftest import assert_as_accurate


def make(batch, length, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + length)
    values, returns, noise = torch.randn(3, batch, length, generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.7
    mask[-1] = batch == 1
    inputs = dict(values=values, returns=returns, old_values=values + noise / 2, mask=mask)
    return {name: x.to(device) for name, x in inputs.items()}


def run(function, inputs, dtype=torch.float32, **kwargs):
    """(loss, metrics by name, d values)"""
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    values = inputs.pop("values").detach().clone().requires_grad_()
    loss, metrics = function(values, inputs.pop("returns"), **inputs, **kwargs)
    loss.backward()
    return loss.detach(), metrics if isinstance(metrics, dict) else metrics._asdict(), values.grad


def check(inputs, **kwargs):
    got = run(value_loss, inputs, **kwargs)
    plain = run(value_loss_ref, inputs, **kwargs)
    truth = run(value_loss_ref, inputs, torch.float64, **kwargs)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    assert_as_accurate("d values", got[2], plain[2], truth[2], factor=3.0)
    for name, want in truth[1].items():
        torch.testing.assert_close(
            got[1][name].double(), want.double(), rtol=1e-4, atol=1e-5, msg=name
        )


def test_hand_computed(device):
    # errors 1, -2; around 0 with clip 1/2 the values count as 1/2 and -1/2
    values = torch.tensor([[2.0, -1.0]], device=device, requires_grad=True)
    returns = torch.tensor([[1.0, 1.0]], device=device)
    out = value_loss(values, returns)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((1 + 4) / 4)
    assert values.grad.tolist() == [[0.5, -1.0]]
    assert out.metrics.squared_error == 2.5 and out.metrics.value == 0.5
    values.grad = None
    zeros = torch.zeros_like(returns)
    out = value_loss(values, returns + torch.tensor([[1.0, 0.0]], device=device), clip=0.5,
                     old_values=zeros)  # fmt: skip
    out.loss.backward()  # (0 or 1.5^2) and (4 or 1.5^2)
    assert out.loss.item() == pytest.approx((1.5**2 + 4) / 4)
    assert values.grad.tolist() == [[0.0, -1.0]]
    assert out.metrics.clip_fraction == 0.5


@pytest.mark.parametrize("length", [1, 16, 45, 600])
def test_values_match_float64(device, length):
    inputs = make(5, length, device)
    check(inputs, clip=0.2, normalizer=1.0)
    check(inputs, normalizer=1.0)
    check({k: inputs[k] for k in ("values", "returns")}, normalizer=1.0)


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_every_aggregation_and_the_split_into_micro_batches(device, aggregate):
    inputs = make(6, 40, device)
    kwargs = dict(aggregate=aggregate, clip=0.2, max_length=40)
    got = run(value_loss, inputs, **kwargs)
    want = run(value_loss_ref, inputs, torch.float64, **kwargs)
    for a, b in ((got[0], want[0]), (got[2], want[2])):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-8)
    sequences = inputs["mask"].any(1).sum()
    normalizer = {
        "token-mean": inputs["mask"].sum(),
        "token-sum": 1,
        "seq-mean-token-sum-norm": sequences * 40,
    }.get(aggregate, sequences)
    parts = [
        run(value_loss, {k: x[i : i + 2] for k, x in inputs.items()}, normalizer=normalizer,
            **kwargs)
        for i in (0, 2, 4)
    ]  # fmt: skip
    torch.testing.assert_close(sum(p[0] for p in parts), got[0])
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), got[2])


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    aggregate=st.sampled_from([a for a in AGGREGATIONS if "norm" not in a]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_packed_equals_padded_and_masked_tokens_may_hold_anything(lengths, aggregate, seed):
    width = max(lengths) + 1
    inputs = make(len(lengths), width, seed=seed)
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    inputs["mask"] &= inside
    kwargs = dict(aggregate=aggregate, clip=0.2)
    rows = run(value_loss, inputs, **kwargs)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    flat = {name: x[inside] for name, x in inputs.items()}
    packed = run(value_loss, flat, cu_seqlens=cu_seqlens, **kwargs)
    torch.testing.assert_close(packed[0], rows[0])
    torch.testing.assert_close(packed[2], rows[2][inside])
    nan = {
        k: x.masked_fill(~inputs["mask"], torch.nan) if x.is_floating_point() else x
        for k, x in inputs.items()
    }
    again = run(value_loss, nan, **kwargs)
    assert torch.equal(again[0], rows[0]) and torch.equal(again[2], rows[2])


def test_empty_and_fully_masked_batches_stay_connected(device):
    for batch, length in ((0, 5), (3, 0), (3, 7)):
        values = torch.randn(batch, length, device=device, requires_grad=True)
        mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        out = value_loss(values, torch.zeros_like(values), mask=mask)
        out.loss.backward()
        assert out.loss == 0 and (values.grad == 0).all() and values.grad.shape == values.shape


def test_opcheck_and_compile(device):
    x = make(4, 20, device)
    args = (x["values"], x["returns"], x["old_values"], x["mask"], None, 0.2, None, None, 1, True)
    torch.library.opcheck(torch.ops.rlhf_fast.value_loss, (*args, 1.0, True))
    torch.library.opcheck(torch.ops.rlhf_fast.value_loss, (*args, 1.0, False))

    def loss(values, returns):
        out = value_loss(values * 2, returns, aggregate="seq-mean-token-mean")
        return out.loss + out.metrics.value

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (4, 2):
        grads = []
        for function in (compiled, loss):
            values = x["values"][:n].clone().requires_grad_()
            function(values, x["returns"][:n]).backward()
            grads.append(values.grad)
        torch.testing.assert_close(grads[0], grads[1])


BAD = {
    r"values must have shape \(B, T\)": lambda v, r: value_loss(v[0], r),
    "returns must have shape": lambda v, r: value_loss(v, r[:, 1:]),
    "old_values must have shape": lambda v, r: value_loss(v, r, old_values=r[:1]),
    "old_values must be given": lambda v, r: value_loss(v, r, clip=0.2),
    "clip must be positive": lambda v, r: value_loss(v, r, old_values=v, clip=0.0),
    "mask must be bool": lambda v, r: value_loss(v, r, mask=r),
    "returns must be on cpu": lambda v, r: value_loss(v, r.to("meta")),
    "aggregate must be one of": lambda v, r: value_loss(v, r, aggregate="mean"),
    "normalizer must be positive": lambda v, r: value_loss(v, r, normalizer=-1),
    "cu_seqlens must rise": lambda v, r: value_loss(v[0], r[0], cu_seqlens=torch.tensor([0, 9])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=rf"value_loss: .*{message}.*got .*;"):
        BAD[message](torch.ones(3, 10), torch.ones(3, 10))
