"""group_advantages: CPU and CUDA kernels (emulated, or real with a GPU) against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import group_advantages, group_advantages_ref
from rlhf_fast.ops.group_advantages import ESTIMATORS
from tests.ops.conftest import assert_as_accurate

SIZES = [4, 1, 8, 2, 70]


def make(device="cpu", binary=False, sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    rewards = torch.randn(total, generator=generator)
    if binary:
        rewards = (rewards > 0).float()
    lengths = torch.randint(1, 500, (total,), generator=generator)
    cu_groups = torch.tensor([0, *sizes]).cumsum(0)
    return rewards.to(device), lengths.to(device), cu_groups.to(device)


def of(estimator, lengths):
    return {"lengths": lengths} if estimator == "opo" else {}


BY_HAND = {  # rewards 0, 1, 1, 2: mean 1, unbiased std sqrt(2/3)
    "grpo": [-(1.5**0.5), 0.0, 0.0, 1.5**0.5],
    "dr_grpo": [-1.0, 0.0, 0.0, 1.0],
    "rloo": [-4 / 3, 0.0, 0.0, 4 / 3],
    "maxrl": [-1.0, 0.0, 0.0, 1.0],
    "opo": [-1.4, -0.4, -0.4, 0.6],  # weights 1, 2, 2, 5 of 10
    "pass_at_k": [-(3**0.5), 3**-0.5, 3**-0.5, 3**-0.5],  # one of four wrong, k = 1: std sqrt(3)/4
    "best": [0.0, 0.0, 0.0, 1.5**0.5],
    "rank": [-0.5, 0.0, 0.0, 0.5],
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hand_computed(device, estimator):
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0], device=device)
    kwargs = dict(estimator=estimator, num_generations=4, epsilon=0.0)
    kwargs |= of(estimator, torch.tensor([1, 2, 2, 5], device=device))
    got = group_advantages(rewards, **kwargs)
    torch.testing.assert_close(got.cpu(), torch.tensor(BY_HAND[estimator]))


def test_pass_at_k_by_hand(device):
    """Two of four wrong, k = 2: a pair fails with chance 1/6."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    got = group_advantages(
        rewards, estimator="pass_at_k", num_generations=4, k=2, epsilon=0.0
    ).cpu()
    deviation = (5 / 6 * 1 / 6) ** 0.5
    right, wrong = (1 - 5 / 6) / deviation, (1 - 1 / 3 - 5 / 6) / deviation
    torch.testing.assert_close(got, torch.tensor([right, wrong, wrong, right]))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_match_float64(device, estimator, binary):
    rewards, lengths, cu_groups = make(device, binary or estimator == "maxrl")
    if estimator == "pass_at_k":
        rewards, lengths, cu_groups = make(device, binary, [4, 3, 8])
    ids = torch.arange(len(cu_groups) - 1).repeat_interleave(cu_groups.diff().cpu()).to(device)
    shuffled = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1)).to(device)
    options = [{}, {"keep_single": True}, {"unbiased": False, "epsilon": 1e-4}]
    for option in options + ([{"k": 3}] if estimator == "pass_at_k" else []):
        kwargs = dict(estimator=estimator, cu_groups=cu_groups, **option)
        kwargs |= of(estimator, lengths)
        got, plain, truth = (
            f(r, **kwargs)
            for f, r in (
                (group_advantages, rewards),
                (group_advantages_ref, rewards),
                (group_advantages_ref, rewards.double()),
            )
        )
        assert_as_accurate(estimator, got, plain, truth)
        kwargs |= of(estimator, lengths[shuffled])
        del kwargs["cu_groups"]
        by_id = group_advantages(rewards[shuffled], group_ids=ids[shuffled] * 7 - 3, **kwargs)
        torch.testing.assert_close(by_id, got[shuffled], rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_give_exactly_zero(device, estimator):
    for value in (0.0, 0.1, 1.0):
        rewards = torch.full((12,), value, device=device)
        lengths = torch.arange(1, 13, device=device)
        got = group_advantages(
            rewards, estimator=estimator, num_generations=6, **of(estimator, lengths)
        )
        assert (got == 0).all() or (estimator == "opo" and got.abs().max() < 1e-7)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    shift=st.floats(-5, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_properties(sizes, shift, seed):
    """Shifts of one prompt's rewards do not matter; advantages sum to 0; groups do not mix."""
    rewards, lengths, cu_groups = make(sizes=sizes, seed=seed)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    shifted = rewards + shift * (group + 1)
    for estimator in ("grpo", "dr_grpo", "rloo", "opo", "best", "rank"):
        kwargs = dict(estimator=estimator, cu_groups=cu_groups) | of(estimator, lengths)
        got = group_advantages(rewards, **kwargs)
        torch.testing.assert_close(group_advantages(shifted, **kwargs), got, rtol=0.01, atol=1e-3)
        if estimator in ("grpo", "dr_grpo", "rloo", "rank"):
            sums = torch.zeros(len(sizes)).index_add(0, group, got)
            assert sums.abs().max() < 1e-4


def test_nan_stays_in_its_group(device):
    rewards, _, cu_groups = make(device)
    rewards[6] = torch.nan
    got = group_advantages(rewards, cu_groups=cu_groups)
    assert got[5:13].isnan().all() and got[:5].isfinite().all() and got[13:].isfinite().all()


def test_empty_batch(device):
    got = group_advantages(torch.zeros(0, device=device), num_generations=4)
    assert got.shape == (0,)


def test_opcheck_and_compile(device):
    rewards, _, cu_groups = make(device)
    args = (rewards, cu_groups, None, 0, 1e-6, 1, True, False)
    torch.library.opcheck(torch.ops.rlhf_fast.group_advantages, args)

    def whole(r, ids):
        return group_advantages(r, num_generations=4) + group_advantages(r * 2, group_ids=ids)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for n in (16, 8):
        r, ids = rewards[:n], torch.arange(n, device=device) % 3
        torch.testing.assert_close(compiled(r, ids), whole(r, ids))


def g(rewards, **kwargs):
    return group_advantages(rewards, **({"num_generations": 2} | kwargs))


BAD = {
    r"rewards must be \(N,\)": lambda r, c: g(r[None]),
    "estimator must be one of": lambda r, c: g(r, estimator="gpro"),
    "said in exactly one way": lambda r, c: g(r, cu_groups=c),
    "num_generations must divide": lambda r, c: g(r, num_generations=7),
    "group_ids must have shape": lambda r, c: g(r, num_generations=None, group_ids=c),
    "lengths must be given for opo alone": lambda r, c: g(r, estimator="opo"),
    "epsilon must be finite": lambda r, c: g(r, epsilon=-1e-6),
    "k must lie between 1": lambda r, c: g(r, estimator="pass_at_k", k=3),
    "no group may be smaller than k=5": lambda r, c: group_advantages(
        r, group_ids=torch.arange(10) // 6, estimator="pass_at_k", k=5
    ),
    "cu_groups must be int32 or int64": lambda r, c: group_advantages(r, cu_groups=c.float()),
    "cu_groups must be on cpu": lambda r, c: group_advantages(r, cu_groups=c.to("meta")),
    "no group may be empty": lambda r, c: group_advantages(r, cu_groups=torch.tensor([0, 0, 10])),
    "must rise from 0 to 10": lambda r, c: group_advantages(r, cu_groups=torch.tensor([0, 9])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    rewards, _, cu_groups = make(sizes=[4, 6])
    with pytest.raises(ValueError, match=rf"group_advantages: .*{message}.*got .*;"):
        BAD[message](rewards, cu_groups)
