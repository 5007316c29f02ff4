"""gae: the CPU kernel and the CUDA kernel (emulated, or real with a GPU) against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import gae, gae_ref, macro_gae
from tests.ops.conftest import assert_as_accurate


def make(batch, length, device="cpu", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + length)
    rewards, values = torch.randn(2, batch, length, generator=generator).to(dtype)
    return rewards.to(device), values.to(device)


def masks(batch, length, device="cpu"):
    """Padding at the right, at both ends, spans of tool output, scattered tokens, nothing."""
    generator = torch.Generator().manual_seed(length)
    position = torch.arange(length)
    last = torch.randint(length + 1, (batch, 1), generator=generator)
    first = torch.randint(length + 1, (batch, 1), generator=generator)
    yield None
    yield (position < last).to(device)
    yield ((position < last) & (position >= first)).to(device)
    yield ((position // 19 + torch.arange(batch)[:, None]) % 3 > 0).to(device)
    yield (torch.rand(batch, length, generator=generator) < 0.5).to(device)
    yield torch.zeros(batch, length, dtype=torch.bool, device=device)


def check(rewards, values, **kwargs):
    got = gae(rewards, values, **kwargs)
    plain = gae_ref(rewards, values, **kwargs)
    truth = gae_ref(rewards.double(), None if values is None else values.double(), **kwargs)
    for name in got._fields:
        triple = (getattr(o, name) for o in (got, plain, truth))
        assert_as_accurate(name, *triple)
    return got


def test_hand_computed(device):
    # delta = [1 + .5*2 - 1, 0 + .5*4 - 2, 2 - 4]; A_2 = -2, A_1 = 0 + .25*-2, A_0 = 1 + .25*-.5
    rewards = torch.tensor([[1.0, 0.0, 2.0]], device=device)
    values = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    out = gae(rewards, values, gamma=0.5, lam=0.5)
    assert out.advantages.tolist() == [[0.875, -0.5, -2.0]]
    assert out.returns.tolist() == [[1.875, 1.5, 2.0]]


def test_masked_tokens_by_hand(device):
    """One tool token in the middle: removed, or a step that discounts."""
    rewards = torch.tensor([[1.0, torch.nan, 2.0]], device=device)
    values = torch.tensor([[1.0, torch.inf, 4.0]], device=device)
    mask = torch.tensor([[True, False, True]], device=device)
    skip = gae(rewards, values, gamma=0.5, lam=0.5, mask=mask)
    assert skip.advantages.tolist() == [[1.0 + 2.0 - 1.0 - 0.5, 0.0, -2.0]]
    zero = gae(rewards, values, gamma=0.5, lam=0.5, mask=mask, masked="zero")
    # the masked step: delta = .5 * 4 = 2, A_1 = 2 - .5; A_0 = 0 + .25 * 1.5
    assert zero.advantages.tolist() == [[0.375, 0.0, -2.0]]
    assert zero.returns.tolist() == [[1.375, 0.0, 2.0]]


@pytest.mark.parametrize("masked", ["skip", "zero"])
@pytest.mark.parametrize("length", [1, 7, 16, 33, 1500])
def test_values_match_float64(device, length, masked):
    rewards, values = make(5, length, device)
    bootstrap = torch.linspace(-1, 1, 5, device=device)
    for mask in masks(5, length, device):
        for extra in ({}, {"bootstrap_values": bootstrap}):
            check(rewards, values, gamma=0.97, lam=0.9, mask=mask, masked=masked, **extra)
    check(rewards, values, gamma=1.0, lam=1.0)
    check(rewards, values, gamma=0.0, lam=0.0)


def test_without_values_returns_are_discounted_sums(device):
    rewards, _ = make(3, 200, device)
    got = check(rewards, None, gamma=0.9, lam=1.0).returns
    weights = 0.9 ** torch.arange(200, dtype=torch.float64, device=device)
    want = (rewards.double() * weights).sum(1)
    torch.testing.assert_close(got[:, 0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_equals_rows(device, index_dtype):
    lengths = [5, 0, 1, 300, 17]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(index_dtype)
    rewards, values = make(1, sum(lengths), device)
    mask = next(m for i, m in enumerate(masks(1, sum(lengths), device)) if i == 3)
    bootstrap = torch.arange(5.0, device=device)
    settings = dict(gamma=0.99, lam=0.95)
    packed = check(
        rewards[0], values[0], mask=mask[0], cu_seqlens=cu_seqlens, bootstrap_values=bootstrap,
        **settings,
    )  # fmt: skip
    begin = 0
    for s, n in enumerate(lengths):
        cut = slice(begin, begin + n)
        row = dict(mask=mask[:, cut], bootstrap_values=bootstrap[s : s + 1])
        alone = gae(rewards[:, cut], values[:, cut], **row, **settings)
        torch.testing.assert_close(packed.advantages[cut], alone.advantages[0])
        begin += n


def test_empty_batches(device):
    for shape in ((0, 5), (3, 0)):
        out = gae(torch.zeros(shape, device=device), torch.zeros(shape, device=device))
        assert out.advantages.shape == out.returns.shape == shape
    out = gae(torch.zeros(0, device=device), cu_seqlens=torch.zeros(1, device=device).long())
    assert out.advantages.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(device, dtype):
    rewards, values = make(3, 100, device, dtype=dtype)
    got = gae(rewards, values.requires_grad_())
    want = gae(rewards.float(), values.float())
    assert got.advantages.dtype == torch.float32 and not got.advantages.requires_grad
    assert torch.equal(got.advantages, want.advantages)


def test_nan_spreads_to_earlier_tokens_of_its_sequence_alone(device):
    rewards, values = make(3, 600, device)
    rewards[1, 300] = torch.nan
    out = gae(rewards, values).advantages
    assert out[1, :301].isnan().all() and out[1, 301:].isfinite().all()
    assert out[[0, 2]].isfinite().all()


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_properties(lengths, gamma, lam, seed):
    """Skipping equals removing; a shift of the rewards' scale scales; sequences do not mix."""
    total = sum(lengths)
    rewards, values = make(1, total, seed=seed)
    rewards, values = rewards[0].double(), values[0].double()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(total, generator=torch.Generator().manual_seed(seed)) < 0.7
    out = gae(rewards, values, gamma=gamma, lam=lam, mask=mask, cu_seqlens=cu_seqlens)
    kept = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens]
    removed = gae(rewards[mask], values[mask], gamma=gamma, lam=lam, cu_seqlens=kept)
    torch.testing.assert_close(out.advantages[mask], removed.advantages, rtol=1e-4, atol=1e-4)
    assert (out.advantages[~mask] == 0).all() and (out.returns[~mask] == 0).all()
    doubled = gae(2 * rewards, 2 * values, gamma=gamma, lam=lam, mask=mask, cu_seqlens=cu_seqlens)
    assert torch.equal(doubled.advantages, 2 * out.advantages)


def test_bitwise_repeatable_and_independent_of_threads_and_batch(device):
    rewards, values = make(9, 1003, device)
    first = gae(rewards, values, gamma=0.99)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(first.advantages, gae(rewards, values, gamma=0.99).advantages)
    finally:
        torch.set_num_threads(threads)
    alone = gae(rewards[4:5], values[4:5], gamma=0.99)
    assert torch.equal(alone.advantages, first.advantages[4:5])


# ---- macro actions -------------------------------------------------------------------------------


def macro_by_hand(rewards, values, starts, mask, gamma, lam):
    """One row, with Python lists."""
    groups = []
    for t in range(len(rewards)):
        if not mask[t]:
            continue
        if starts[t] or not groups:
            groups.append([])
        groups[-1].append(t)
    r = torch.tensor([[sum(rewards[t] for t in g) for g in groups]], dtype=torch.float64)
    v = torch.tensor([[sum(values[t] for t in g) / len(g) for g in groups]], dtype=torch.float64)
    out = gae_ref(r, v, gamma=gamma, lam=lam)
    advantages, returns = torch.zeros(2, len(rewards), dtype=torch.float64)
    for k, group in enumerate(groups):
        advantages[group], returns[group] = out.advantages[0, k], out.returns[0, k]
    return advantages, returns


def test_macro_actions(device):
    rewards, values = make(4, 30, device)
    starts = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    settings = dict(gamma=0.9, lam=0.8)
    for mask in masks(4, 30):
        mask = torch.ones(4, 30, dtype=torch.bool) if mask is None else mask
        args = rewards, values, starts.to(device)
        got = macro_gae(*args, mask=mask.to(device), **settings)
        packed = macro_gae(
            *(x.reshape(-1) for x in args), mask=mask.to(device).reshape(-1),
            cu_seqlens=torch.arange(5, device=device) * 30, **settings,
        )  # fmt: skip
        for row in range(4):
            lists = (x[row].tolist() for x in (rewards, values, starts, mask))
            for name, want in zip(got._fields, macro_by_hand(*lists, **settings)):
                x = getattr(got, name)[row].double().cpu()
                torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(packed.advantages, got.advantages.reshape(-1))


def test_macro_actions_of_one_token_are_tokens(device):
    rewards, values = make(3, 20, device)
    starts = torch.ones(3, 20, dtype=torch.bool, device=device)
    got, want = macro_gae(rewards, values, starts), gae(rewards, values)
    torch.testing.assert_close(got.advantages, want.advantages)


def test_nan_is_not_lost_in_a_macro_action(device):
    rewards, values = make(2, 6, device)
    rewards[0, 3] = torch.nan
    starts = torch.tensor([1, 0, 1, 0, 1, 0], device=device).bool().expand(2, 6)
    got = macro_gae(rewards, values, starts)
    assert got.advantages[0, :4].isnan().all() and got.returns[0, :4].isnan().all()
    assert got.advantages[0, 4:].isfinite().all() and got.advantages[1].isfinite().all()
    with pytest.raises(ValueError, match="macro_gae: cu_seqlens must rise .* got .*;"):
        macro_gae(*(x[0] for x in (rewards, values, starts)), cu_seqlens=torch.tensor([0, 4]))


# ---- dispatcher, compiler, bad input -------------------------------------------------------------


def test_opcheck(device):
    rewards, values = make(3, 40, device)
    mask = rewards > 0
    op = torch.ops.rlhf_fast.gae_forward
    torch.library.opcheck(op, (rewards, values, mask, None, None, 0.9, 0.9, True))
    cu_seqlens = torch.tensor([0, 20, 120], device=device)
    args = (rewards.reshape(-1), None, None, cu_seqlens, rewards[0, :2].contiguous(), 1.0, 1.0)
    torch.library.opcheck(op, (*args, False))


def test_torch_compile_without_graph_breaks(device):
    def whole(rewards, values):
        out = gae(rewards * 2, values, gamma=0.9)
        return out.advantages + macro_gae(rewards, values, rewards > 0).returns

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for batch in (4, 3):
        rewards, values = make(batch, 50, device)
        torch.testing.assert_close(compiled(rewards, values), whole(rewards, values))


ONE = torch.ones(1)
BAD = {
    r"rewards must have shape \(B, T\)": lambda r, v: gae(r[0], v),
    "rewards must be of a floating": lambda r, v: gae(r.long(), v),
    r"rewards must have shape \(N,\)": lambda r, v: gae(r, v, cu_seqlens=torch.tensor([0, 30])),
    "values must have shape": lambda r, v: gae(r, v[:, 1:]),
    "values must be on cpu": lambda r, v: gae(r, v.to("meta")),
    "mask must be bool": lambda r, v: gae(r, v, mask=torch.ones(3, 10)),
    "mask must have shape": lambda r, v: gae(r, v, mask=torch.ones(3, 9).bool()),
    r"gamma must lie in \[0, 1\]": lambda r, v: gae(r, v, gamma=1.1),
    r"lam must lie in \[0, 1\]": lambda r, v: gae(r, v, lam=float("nan")),
    "masked must be one of": lambda r, v: gae(r, v, masked="drop"),
    r"bootstrap_values must have shape \(3,\)": lambda r, v: gae(r, v, bootstrap_values=ONE),
    "cu_seqlens must be int32 or int64": lambda r, v: gae(r[0], v[0], cu_seqlens=ONE),
    "cu_seqlens must rise from 0": lambda r, v: gae(r[0], v[0], cu_seqlens=torch.tensor([0, 9])),
    "to the number of tokens, 10": lambda r, v: gae(
        r[0], v[0], cu_seqlens=torch.tensor([0, 7, 5, 10])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    rewards, values = make(3, 10)
    with pytest.raises(ValueError, match="gae: .*got .*;"):
        BAD[message](rewards, values)
    with pytest.raises(ValueError, match=message):
        BAD[message](rewards, values)


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_gae as t\n"
        "for length in (1, 16, 33, 1500):\n"
        "  for masked in ('skip', 'zero'): t.test_values_match_float64('cpu', length, masked)\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
