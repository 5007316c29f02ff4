"""whiten: the CPU kernel and the CUDA kernel (emulated, or real with a GPU) against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import whiten, whiten_ref, whiten_statistics
from tests.ops.conftest import assert_as_accurate


def make(shape, device="cpu", mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 3 + mean
    mask = torch.rand(shape, generator=generator) < 0.7
    return values.to(device), mask.to(device)


def test_hand_computed(device):
    values = torch.tensor([1.0, 2.0, torch.nan, 6.0], device=device)
    mask = torch.tensor([True, True, False, True], device=device)
    got = whiten(values, mask, epsilon=0.0)  # mean 3, sum of squares 4 + 1 + 9 = 14
    root = 7.0**0.5
    want = torch.tensor([-2 / root, -1 / root, 0.0, 3 / root], device=device)
    torch.testing.assert_close(got, want)
    biased = whiten(values, mask, epsilon=0.0, unbiased=False, shift_mean=False)
    root = (14 / 3) ** 0.5
    want = torch.tensor([3 - 2 / root, 3 - 1 / root, 0.0, 3 + 3 / root], device=device)
    torch.testing.assert_close(biased, want)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 4096), (5, 2000)])
def test_values_match_float64(device, shape, mean):
    values, mask = make(shape, device, mean)
    for m in (None, mask):
        for options in ({}, {"shift_mean": False}, {"unbiased": False, "epsilon": 0.1}):
            got, plain = (f(values, m, **options) for f in (whiten, whiten_ref))
            truth = whiten_ref(values.double(), m, **options)
            # Where one value is left, its distance from the mean is rounding alone.
            if (values.numel() if m is None else int(m.sum())) > 1:
                assert_as_accurate("whitened", got, plain, truth)


def test_nothing_and_one_value(device):
    values, _ = make((4, 5), device)
    for count in (0, 1):
        mask = torch.zeros(4, 5, dtype=torch.bool, device=device)
        mask.view(-1)[:count] = True
        assert (whiten(values, mask) == 0).all()
    assert whiten(values[:0]).shape == (0, 5)


def test_statistics_of_parts_add_up(device):
    """What several processes do: their sums are added, the result is that of one process."""
    values, mask = make((6, 500), device)
    whole = whiten(values, mask)
    parts = [whiten_statistics(values[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    total = torch.stack(parts).sum(0)
    halves = [whiten(values[i : i + 2], mask[i : i + 2], statistics=total) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(halves), whole)


@given(
    count=st.integers(2, 300),
    shift=st.floats(-100, 100),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_invariant_to_shift_and_scale(count, shift, scale, seed):
    values, mask = make((count,), seed=seed)
    mask[:2] = True
    got = whiten(values * scale + shift, mask, epsilon=0.0)
    torch.testing.assert_close(got, whiten(values, mask, epsilon=0.0), rtol=1e-3, atol=1e-3)
    x = got[mask].double()
    assert abs(x.mean()) < 1e-3 and abs(x.var() - 1) < 1e-3


def test_bitwise_repeatable_and_independent_of_threads(device):
    values, mask = make((50, 1000), device)
    first = whiten(values, mask)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, whiten(values, mask))
    finally:
        torch.set_num_threads(threads)


def test_opcheck_and_compile(device):
    values, mask = make((3, 40), device)
    statistics = whiten_statistics(values, mask)
    torch.library.opcheck(torch.ops.rlhf_fast.whiten_statistics, (values, mask))
    args = (values, mask, statistics, 1e-8, True, False)
    torch.library.opcheck(torch.ops.rlhf_fast.whiten_apply, args)
    compiled = torch.compile(lambda x, m: whiten(x * 2, m), fullgraph=True, backend="aot_eager")
    for n in (3, 2):
        torch.testing.assert_close(compiled(values[:n], mask[:n]), whiten(2 * values[:n], mask[:n]))


BAD = {
    "values must be of a floating": lambda x, m: whiten(x.long(), m),
    "mask must be bool": lambda x, m: whiten(x, m.float()),
    "mask must have shape": lambda x, m: whiten(x, m[:2]),
    "mask must be on cpu": lambda x, m: whiten(x, m.to("meta")),
    "epsilon must be finite and not negative": lambda x, m: whiten(x, m, epsilon=-1.0),
    "statistics must be float64": lambda x, m: whiten(x, m, statistics=torch.ones(3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    values, mask = make((3, 10))
    with pytest.raises(ValueError, match=rf"whiten: .*{message}.*got .*;"):
        BAD[message](values, mask)
