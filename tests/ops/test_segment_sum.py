"""segment_sum: against float64, packed = padded, and sequences without tokens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import segment_sum, segment_sum_ref
from tests.ops.conftest import assert_as_accurate

OFFSETS = [0, 0, 1, 40, 40, 1500, 1533, 1533]  # empty, single-token and long sequences


def make(device="cpu", packed=True, masked=False, weighted=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (OFFSETS[-1],) if packed else (5, 307)
    values = torch.randn(shape, generator=generator) - 1
    kwargs = {}
    if packed:
        kwargs["cu_seqlens"] = torch.tensor(OFFSETS, device=device)
    if masked:
        mask = torch.rand(shape, generator=generator) < 0.6
        mask.view(-1)[:307] = False
        kwargs["mask"] = mask.to(device)
    if weighted:
        kwargs["weights"] = torch.rand(shape, generator=generator).to(device)
    return values.to(device), kwargs


def gradient(function, values, **kwargs):
    values = values.detach().clone().requires_grad_()
    out = function(values, **kwargs)
    upstream = torch.linspace(-1, 2, len(out), device=out.device, dtype=out.dtype)
    return torch.autograd.grad((out * upstream).sum(), values)[0]


def check(values, **kwargs):
    calls = ((segment_sum, values), (segment_sum_ref, values), (segment_sum_ref, values.double()))
    assert_as_accurate("sum", *(f(x, **kwargs) for f, x in calls))
    assert_as_accurate("gradient", *(gradient(f, x, **kwargs) for f, x in calls))


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_values_and_gradients_match_float64(device, packed, masked, weighted, mean):
    values, kwargs = make(device, packed, masked, weighted)
    check(values, mean=mean, **kwargs)


def test_hand_computed(device):
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    cu_seqlens = torch.tensor([0, 1, 1, 4], device=device)
    assert segment_sum(values, cu_seqlens=cu_seqlens).tolist() == [1.0, 0.0, 9.0]
    assert segment_sum(values, cu_seqlens=cu_seqlens, mean=True).tolist() == [1.0, 0.0, 3.0]
    mask = torch.tensor([[True, False], [False, False]], device=device)
    assert segment_sum(values.view(2, 2), mask=mask, mean=True).tolist() == [1.0, 0.0]
    weights = torch.tensor([0.5, 0.0, 2.0, 0.5], device=device)
    got = segment_sum(values, cu_seqlens=cu_seqlens, weights=weights, mean=True)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.0, 8.0 / 3], device=device))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=9), mean=st.booleans())
def test_packed_equals_padded(device, lengths, mean):
    width = max(max(lengths), 1)
    padded = torch.randn(len(lengths), width)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = padded[mask]
    got = segment_sum(packed.to(device), cu_seqlens=cu_seqlens.to(device), mean=mean)
    want = segment_sum(padded.to(device), mask=mask.to(device), mean=mean)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_masked_values_are_not_looked_at(device):
    values, kwargs = make(device, masked=True)
    values[~kwargs["mask"]] = torch.nan
    check(values, **kwargs)
    assert (gradient(segment_sum, values, **kwargs)[~kwargs["mask"]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_summed_in_float32(device, dtype):
    values, kwargs = make(device)
    out = segment_sum(values.to(dtype), **kwargs)
    assert out.dtype == torch.float32
    assert torch.equal(out, segment_sum(values.to(dtype).float(), **kwargs))
    assert gradient(segment_sum, values.to(dtype), **kwargs).dtype == dtype


def test_strided_rows_and_expanded_gradients(device):
    base = torch.randn(4, 9, device=device)
    torch.testing.assert_close(segment_sum(base[:, 1:]), base[:, 1:].sum(1))
    leaf = base.clone().requires_grad_()
    segment_sum(leaf[:, :-1]).sum().backward()  # the upstream gradient is an expanded one
    assert (leaf.grad[:, :-1] == 1).all() and (leaf.grad[:, -1] == 0).all()


def test_no_tokens_and_no_sequences_stay_connected(device):
    for shape, offsets in (((0,), [0]), ((0,), [0, 0, 0]), ((3, 0), None), ((0, 4), None)):
        values = torch.zeros(shape, device=device, requires_grad=True)
        cu_seqlens = None if offsets is None else torch.tensor(offsets, device=device)
        out = segment_sum(values, cu_seqlens=cu_seqlens, mean=True)
        assert (out == 0).all() and len(out) == (shape[0] if offsets is None else len(offsets) - 1)
        out.sum().backward()
        assert values.grad.shape == shape


def test_repeatable_and_independent_of_threads_and_batch(device):
    values, kwargs = make(device)
    first = segment_sum(values, **kwargs)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, segment_sum(values, **kwargs))
    finally:
        torch.set_num_threads(threads)
    alone = segment_sum(values[40:1500], cu_seqlens=torch.tensor([0, 1460], device=device))
    assert torch.equal(alone[0], first[4])


def test_opcheck(device):
    values, kwargs = make(device, masked=True, weighted=True)
    args = (kwargs["cu_seqlens"], kwargs["mask"], kwargs["weights"], True)
    torch.library.opcheck(torch.ops.rlhf_fast.segment_sum_forward, (values, *args))
    counts = torch.rand(2, 7, device=device)
    torch.library.opcheck(
        torch.ops.rlhf_fast.segment_sum_backward, (counts[0], *args, counts[1], values.shape)
    )


def test_torch_compile_without_graph_breaks(device):
    def loss(values, cu_seqlens):
        return segment_sum(values * 2, cu_seqlens=cu_seqlens, mean=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for offsets in ([0, 3, 8], [0, 1, 5]):
        cu_seqlens = torch.tensor(offsets, device=device)
        values = torch.rand(offsets[-1], device=device)
        leaves = [values.clone().requires_grad_() for _ in range(2)]
        compiled(leaves[0], cu_seqlens).backward()
        loss(leaves[1], cu_seqlens).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


BAD = {
    r"values must have shape \(B, T\)": lambda v: segment_sum(v),
    r"values must have shape \(N,\)": lambda v: segment_sum(v[None], cu_seqlens=offsets(0, 5)),
    "values must be of a floating-point": lambda v: segment_sum(v.long(), cu_seqlens=offsets(0, 5)),
    "cu_seqlens must be int32 or int64": lambda v: segment_sum(v, cu_seqlens=v),
    "cu_seqlens must rise from 0 to the number of tokens, 5": lambda v: segment_sum(
        v, cu_seqlens=offsets(0, 4)
    ),
    "cu_seqlens must rise": lambda v: segment_sum(v, cu_seqlens=offsets(0, 4, 3, 5)),
    "cu_seqlens must be on": lambda v: segment_sum(v, cu_seqlens=offsets(0, 5).to("meta")),
    "mask must be bool": lambda v: segment_sum(v, cu_seqlens=offsets(0, 5), mask=v),
    r"mask must have shape \(5,\)": lambda v: segment_sum(
        v, cu_seqlens=offsets(0, 5), mask=v[1:] > 0
    ),
    "weights must be constants": lambda v: segment_sum(
        v, cu_seqlens=offsets(0, 5), weights=v.clone().requires_grad_()
    ),
}


def offsets(*values):
    return torch.tensor(values)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    values = torch.rand(5)
    with pytest.raises(ValueError, match="segment_sum: .*got .*;"):
        BAD[message](values)
    with pytest.raises(ValueError, match=message):
        BAD[message](values)


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_segment_sum as t\n"
        "for flags in range(8):\n"
        "  values, kwargs = t.make('cpu', flags & 1, flags & 2, flags & 4)\n"
        "  t.check(values, **kwargs)\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
