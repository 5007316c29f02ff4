"""policy_loss: CPU and CUDA kernels (emulated, or real with a GPU) against float64 autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import (
    PolicyLossParams,
    policy_loss,
    policy_loss_coefficients,
    policy_loss_ref,
)
from rlhf_fast.ops.policy_params import AGGREGATIONS, KL_CORRECTIONS, LOSS_TYPES
from tests.ops.conftest import assert_as_accurate

PER_TOKEN = ("old_logps", "advantages", "mask", "ref_logps", "sampling_logps", "entropy")


def make(batch, length, device="cpu", seed=0, spread=0.3):
    """Arguments of a batch in which every clip happens; the mask leaves the last row empty."""
    generator = torch.Generator().manual_seed(seed + length)

    def noise():
        return torch.randn(batch, length, generator=generator)

    logps = -torch.rand(batch, length, generator=generator) * 3
    old_logps = logps + noise() * spread
    mask = torch.rand(batch, length, generator=generator) < 0.8
    mask[-1] = batch == 1
    sampling_logps = old_logps + noise() * spread
    sampling_logps.view(-1)[::7] = torch.nan
    inputs = dict(
        logps=logps,
        old_logps=old_logps,
        advantages=noise(),
        mask=mask,
        ref_logps=logps + noise() * spread,
        sampling_logps=sampling_logps,
        entropy=torch.rand(batch, length, generator=generator),
    )
    return {name: x.to(device) for name, x in inputs.items()}


def packed(inputs, lengths):
    """The first `lengths` tokens of each row, one after another, and their offsets."""
    device = inputs["logps"].device
    flat = {
        name: torch.cat([row[:n] for row, n in zip(x, lengths)]) if x.dim() == 2 else x
        for name, x in inputs.items()
    }
    return flat | {"cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0)}


def run(function, inputs, dtype=torch.float32, **kwargs):
    """(loss, metrics by name, d logps, d entropy)"""
    inputs = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    logps = inputs.pop("logps").detach().clone().requires_grad_()
    if inputs.get("entropy") is not None:
        inputs["entropy"] = inputs["entropy"].detach().clone().requires_grad_()
    args = (logps, inputs.pop("old_logps", None), inputs.pop("advantages"))
    loss, metrics = function(*args, **inputs, **kwargs)
    loss.backward()
    entropy = inputs.get("entropy")
    metrics = metrics if isinstance(metrics, dict) else metrics._asdict()
    return loss.detach(), metrics, logps.grad, None if entropy is None else entropy.grad


def check(inputs, **kwargs):
    got = run(policy_loss, inputs, **kwargs)
    plain = run(policy_loss_ref, inputs, **kwargs)
    truth = run(policy_loss_ref, inputs, torch.float64, **kwargs)
    scale = 1.0 + float(truth[2].abs().sum())
    assert abs(got[0] - truth[0]) < 2e-6 * scale, (got[0].item(), truth[0].item())
    assert_as_accurate("d logps", got[2], plain[2], truth[2], factor=3.0)
    if truth[3] is not None:
        torch.testing.assert_close(got[3].double(), truth[3], rtol=1e-5, atol=1e-7)
    for name, want in truth[1].items():
        torch.testing.assert_close(
            got[1][name].double(), want.double(), rtol=2e-4, atol=2e-5, msg=name
        )
    return got


# ---- by hand -------------------------------------------------------------------------------------

E, LN2 = math.e, math.log(2)
# Two tokens of one sequence with ratios 2 and 1/2, logps -1 and -2, and their mean over tokens for
# an advantage of 1 and of -1. Their product and geometric mean are 1.
HAND = {
    "reinforce": (1.5, -1.5),
    "remax": (3.0, -3.0),
    "rloo": (-1.0, 1.0),
    "reinforce++": (-(1.2 + 0.5) / 2, (2.0 + 0.8) / 2),
    "ppo": (-(1.2 + 0.5) / 2, (2.0 + 0.8) / 2),
    "grpo": (-(1.2 + 0.5) / 2, (2.0 + 0.8) / 2),
    "bnpo": (-(1.2 + 0.5) / 2, (2.0 + 0.8) / 2),
    "dapo": (-(1.2 + 0.5) / 2, (2.0 + 0.8) / 2),
    "dr_grpo": (-(1.2 + 0.5) / 2, (2.0 + 0.8) / 2),
    "cispo": ((1.2 * 1 + 0.8 * 2) / 2, -(1.2 * 1 + 0.8 * 2) / 2),
    "gspo": (-1.0, 1.0),
    "gspo_token": (-1.0, 1.0),
    "luspo": (-2.0, 2.0),
    "gmpo": (-math.exp((0.2 - LN2) / 2), math.exp((LN2 - 0.2) / 2)),
    "sapo": (
        -2 * (1 / (1 + E**-1) + 1 / (1 + E**0.5)),
        2 / 1.05 * (1 / (1 + E**-1.05) + 1 / (1 + E ** (0.5 * 1.05))),
    ),
    "vespo": (1.5, -1.5),
    "a_lol": (3.0, 0.0),
    "dro": (1.5 + LN2**2 / 2, -1.5 + LN2**2 / 2),
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_hand_computed(device, loss_type):
    logps = torch.tensor([[-1.0, -2.0]], device=device)
    old_logps = logps - torch.tensor([[LN2, -LN2]], device=device)
    for sign, want in zip((1.0, -1.0), HAND[loss_type]):
        advantages = torch.tensor([sign], device=device)
        out = policy_loss(logps, old_logps, advantages, loss_type=loss_type)
        assert out.loss.item() == pytest.approx(want, rel=2e-6, abs=1e-6), sign


def test_ppo_gradient_and_metrics_by_hand(device):
    logps = torch.tensor([[-1.0, -2.0, -3.0]], device=device, requires_grad=True)
    log_ratio = torch.tensor([[LN2, -LN2, 0.0]], device=device)
    mask = torch.tensor([[True, True, True]], device=device)
    advantages = torch.tensor([[1.0, 1.0, -1.0]], device=device)
    out = policy_loss(logps, logps.detach() - log_ratio, advantages, mask=mask)
    out.loss.backward()  # the first is cut off
    torch.testing.assert_close(logps.grad.cpu(), torch.tensor([[0.0, -0.5, 1.0]]) / 3)
    metrics = {name: x.item() for name, x in out.metrics._asdict().items()}
    assert metrics["clip_high"] == pytest.approx(1 / 3) and metrics["clip_low"] == 0
    assert metrics["ratio"] == pytest.approx(3.5 / 3)
    assert metrics["old_kl_k1"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["old_kl_k2"] == pytest.approx(LN2**2 / 3)
    assert metrics["old_kl_k3"] == pytest.approx(0.5 / 3, rel=1e-5)
    assert metrics["num_tokens"] == 3


def test_gspo_spreads_its_gradient_over_the_sequence(device):
    logps = torch.tensor([[-1.0, -2.0]], device=device, requires_grad=True)
    old_logps = logps.detach() - 0.1
    policy_loss(logps, old_logps, torch.ones(1, device=device), loss_type="gspo").loss.backward()
    torch.testing.assert_close(logps.grad, torch.full_like(logps, -math.exp(0.1) / 2))


AGGREGATED = {  # token losses 1, 2, 3 of one sequence, 10 of another, and an empty one
    "token-mean": 16 / 4,
    "token-sum": 16,
    "seq-mean-token-mean": (2 + 10) / 2,
    "seq-mean-token-sum": 16 / 2,
    "seq-mean-token-sum-norm": 16 / 2 / 3,
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand(device, aggregation):
    logps = -torch.tensor([[1.0, 2.0, 3.0], [10.0, torch.nan, 7.0], [9.0, 9.0, 9.0]]).to(device)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], device=device).bool()
    params = PolicyLossParams(aggregation=aggregation)
    kwargs = dict(mask=mask, loss_type="reinforce", params=params)
    ones = torch.ones(3, device=device)
    loss = policy_loss(logps, None, ones, **kwargs).loss
    assert loss.item() == pytest.approx(AGGREGATED[aggregation])
    given = policy_loss(logps, None, ones, normalizer=8, **kwargs).loss
    total = 12 if aggregation == "seq-mean-token-mean" else 16
    assert given.item() == pytest.approx(total / 8)
    tensor = torch.tensor(8, device=device)
    assert torch.equal(given, policy_loss(logps, None, ones, normalizer=tensor, **kwargs).loss)


# ---- against float64 -----------------------------------------------------------------------------

LEVELS = ("token", "sequence-mean", "sequence-sum")


@pytest.mark.parametrize("length", [1, 16, 45, 300])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_matches_float64(device, loss_type, length):
    inputs = make(5, length, device, spread=0.3 if length < 100 else 0.03)
    plain = {k: inputs[k] for k in ("logps", "old_logps", "advantages")}
    kwargs = dict(loss_type=loss_type, normalizer=1.0)
    check(plain, **kwargs)
    check(plain | {"advantages": inputs["advantages"][:, 0].clone()}, **kwargs)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.01, dual_clip=1.4, epsilon_high=0.28)
    check(inputs, params=params, **kwargs)
    check(inputs | {"old_logps": inputs["logps"]}, params=params, **kwargs)
    without_old = {k: v for k, v in inputs.items() if k != "old_logps"}
    check(without_old, params=params, **kwargs)


@pytest.mark.parametrize("ratio_level", LEVELS)
@pytest.mark.parametrize("loss_type", ["ppo", "cispo", "sapo", "gmpo", "gspo_token"])
def test_every_loss_at_every_ratio_level(device, loss_type, ratio_level):
    inputs = make(5, 20, device, spread=0.1)
    params = PolicyLossParams(ratio_level=ratio_level, kl_coef=0.1)
    check(inputs, loss_type=loss_type, params=params, normalizer=1.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_every_aggregation(device, loss_type, aggregation):
    params = PolicyLossParams(aggregation=aggregation, kl_coef=0.1, entropy_coef=0.1)
    inputs = make(6, 40, device)
    got = run(policy_loss, inputs, loss_type=loss_type, params=params)
    want = run(policy_loss_ref, inputs, torch.float64, loss_type=loss_type, params=params)
    for a, b in ((got[0], want[0]), (got[2], want[2]), (got[3], want[3])):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("correction", KL_CORRECTIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_kl(device, estimator, correction):
    inputs = make(5, 40, device, spread=1.0)
    for bound in (None, 0.5):
        for loss_type in ("ppo", "gspo"):
            params = PolicyLossParams(
                kl_coef=1.0, kl_estimator=estimator, kl_correction=correction, kl_bound=bound
            )
            check(inputs, params=params, loss_type=loss_type, normalizer=1.0)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence-gate"])
def test_every_sampling_correction(device, level, correction):
    inputs = make(8, 20, device)
    for low, high in ((0.0, 2.0), (0.8, 1.3)):
        params = PolicyLossParams(
            sampling_level=level,
            sampling_correction=correction,
            sampling_low=low,
            sampling_high=high,
        )
        for loss_type in ("ppo", "gspo", "vespo") if level == "token" else ("ppo", "gspo"):
            check(inputs, params=params, loss_type=loss_type, normalizer=1.0)


def test_log_ratios_beyond_the_bound_pass_no_gradient(device):
    inputs = make(3, 30, device)
    inputs["old_logps"] = inputs["logps"] - torch.linspace(-25, 25, 90, device=device).view(3, 30)
    inputs["advantages"] = -inputs["advantages"].abs()  # nothing is clipped from above
    for loss_type in ("ppo", "gspo", "rloo"):
        params = PolicyLossParams(log_ratio_bound=3.0, kl_coef=0.1, kl_correction="importance")
        check(inputs, params=params, loss_type=loss_type, normalizer=1e3)
    far = PolicyLossParams(log_ratio_bound=math.inf)
    out = run(policy_loss, inputs, params=far)
    assert out[0].isfinite() and out[2].isfinite().all()


@pytest.mark.parametrize("loss_type", ["ppo", "grpo", "gspo", "gmpo", "vespo", "luspo"])
def test_packed_equals_padded(device, loss_type):
    inputs = make(6, 50, device)
    lengths = [50, 0, 1, 17, 33, 48]
    flat = packed(inputs, lengths)
    check(flat, loss_type=loss_type, normalizer=1.0)
    position = torch.arange(50, device=device)
    inside = position < torch.tensor(lengths, device=device)[:, None]
    rows = run(policy_loss, inputs | {"mask": inputs["mask"] & inside}, loss_type=loss_type)
    tokens = run(policy_loss, flat, loss_type=loss_type)
    torch.testing.assert_close(tokens[0], rows[0])
    torch.testing.assert_close(tokens[2], rows[2][inside])
    one_each = inputs["advantages"][:, 0].clone()
    for x in (flat, inputs):
        x["advantages"] = one_each
    inputs["mask"] &= inside
    a, b = (run(policy_loss, x, loss_type=loss_type)[0] for x in (flat, inputs))
    torch.testing.assert_close(a, b)


def test_macro_actions(device):
    """Segments of one token are tokens, segments of a sequence are sequences; others by hand."""
    inputs = make(4, 12, device, spread=0.1)
    width = torch.arange(4 * 12 + 1, device=device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1, dual_clip=1.5)
    for name in AGGREGATIONS:
        params = PolicyLossParams(aggregation=name, kl_coef=0.1, entropy_coef=0.1, max_length=7)
        for cu_segments, loss_type, same in ((width, "ppo", "ppo"), (width[::12], "gspo", "gspo")):
            got = run(
                policy_loss, inputs, loss_type=loss_type, params=params, cu_segments=cu_segments
            )
            want = run(policy_loss, inputs, loss_type=same, params=params)
            for k in (0, 2, 3):
                torch.testing.assert_close(got[k], want[k])
    # Two macro actions of a row: ratios 1.1 * 1.1 and 0.5 * 1, cut off at 1.2 and not.
    log_ratio = torch.tensor([[1.1, 1.1, 0.5, 1.0]], device=device).log()
    logps = torch.full((1, 4), -1.0, device=device, requires_grad=True)
    cu_segments = torch.tensor([0, 2, 4], device=device)
    one = torch.ones(1, device=device)
    old_logps = logps.detach() - log_ratio
    out = policy_loss(logps, old_logps, one, loss_type="grpo", cu_segments=cu_segments)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-(2 * 1.2 + 2 * 0.5) / 4)
    torch.testing.assert_close(logps.grad.cpu(), torch.tensor([[0.0, 0.0, -0.25, -0.25]]))


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_type", ["ppo", "gspo", "vespo"])
def test_the_split_into_micro_batches_changes_nothing(device, loss_type, aggregation):
    inputs = make(6, 30, device)
    params = PolicyLossParams(
        aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01, max_length=30
    )
    kwargs = dict(loss_type=loss_type, params=params)
    whole = run(policy_loss, inputs, **kwargs)
    mask = inputs["mask"]
    sequences = mask.any(1).sum()
    normalizer = {
        "token-mean": mask.sum(),
        "token-sum": 1,
        "seq-mean-token-sum-norm": sequences * 30,
    }.get(aggregation, sequences)
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        parts = [
            run(policy_loss, part, normalizer=normalizer, **kwargs) for part in split(inputs, sizes)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        for k in (2, 3):
            torch.testing.assert_close(torch.cat([p[k] for p in parts]), whole[k])


def split(inputs, sizes):
    pieces = {name: x.split(sizes) for name, x in inputs.items()}
    return [{name: x[i] for name, x in pieces.items()} for i in range(len(sizes))]


@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 40),
    loss_type=st.sampled_from(sorted(LOSS_TYPES)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_properties(batch, length, loss_type, seed):
    inputs = make(batch, length, seed=seed, spread=0.1)
    loss, metrics, grad, _ = run(policy_loss, inputs, loss_type=loss_type)
    assert (grad[~inputs["mask"]] == 0).all()
    # The order of sequences does not matter.
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    shuffled = {name: x[order] for name, x in inputs.items()}
    again = run(policy_loss, shuffled, loss_type=loss_type)
    torch.testing.assert_close(again[0], loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(again[2], grad[order])
    # Equal policies: ratio 1, nothing clipped, no KL; the gradient is that of -A logp but for vespo
    # and a_lol, which weigh sequences by their advantage's sign.
    same = {k: inputs[k] for k in ("logps", "advantages", "mask")} | {"old_logps": inputs["logps"]}
    params = PolicyLossParams(aggregation="token-sum", ratio_level="token")
    _, metrics, grad, _ = run(policy_loss, same, loss_type=loss_type, params=params)
    counted = bool(inputs["mask"].any())
    assert metrics["ratio"] == float(counted) and metrics["clip_low"] + metrics["clip_high"] == 0
    assert metrics["old_kl_k3"] == metrics["old_kl_k1"] == 0
    want = -inputs["advantages"] * inputs["mask"]
    if loss_type == "a_lol":
        want = want.clamp(max=0)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_and_fully_masked_batches_stay_connected(device, loss_type):
    for batch, length in ((0, 5), (3, 0), (3, 7)):
        inputs = make(max(batch, 1), length, device)
        inputs = {name: x[:1].expand(batch, length).clone() for name, x in inputs.items()}
        inputs["mask"] = torch.zeros(batch, length, dtype=torch.bool, device=device)
        loss, metrics, grad, _ = run(policy_loss, inputs, loss_type=loss_type)
        assert loss == 0 and (grad == 0).all() and grad.shape == (batch, length)
        assert all(float(x) == 0 for x in metrics.values())


def test_masked_tokens_may_hold_anything(device):
    inputs = make(5, 40, device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
    masked = ~inputs["mask"]
    for value in (torch.nan, torch.inf, -torch.inf):
        other = {
            k: x.masked_fill(masked, value) if x.is_floating_point() else x
            for k, x in inputs.items()
        }
        for loss_type in ("ppo", "gspo", "gmpo", "vespo", "sapo"):
            a, b = (
                run(policy_loss, x, loss_type=loss_type, params=params) for x in (inputs, other)
            )
            assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])


def test_nan_logps_show_in_the_loss_and_stay_in_their_token(device):
    inputs = make(3, 40, device)
    inputs["mask"][:] = True
    inputs["logps"][1, 5] = torch.nan
    for loss_type, spread in (("ppo", 1), ("gspo", 40)):
        loss, _, grad, _ = run(policy_loss, inputs, loss_type=loss_type)
        assert loss.isnan() and grad.isnan().sum() <= spread


def test_coefficients_are_the_gradient(device):
    inputs = make(5, 40, device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
    for loss_type in ("ppo", "gspo"):
        loss, _, d_logps, d_entropy = run(policy_loss, inputs, loss_type=loss_type, params=params)
        args = dict(inputs)
        out = policy_loss_coefficients(
            args.pop("logps"), args.pop("old_logps"), args.pop("advantages"), **args,
            loss_type=loss_type, params=params,
        )  # fmt: skip
        assert torch.equal(out.loss, loss) and torch.equal(out.d_logps, d_logps)
        assert torch.equal(out.d_entropy, d_entropy)


def test_upstream_gradient_and_other_dtypes(device):
    inputs = make(4, 33, device)
    for dtype in (torch.bfloat16, torch.float64):
        x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        logps = x["logps"].requires_grad_()
        loss = policy_loss(logps, x["old_logps"], x["advantages"], mask=x["mask"]).loss
        (3 * loss).backward()
        plain = {k: x[k].detach().float() for k in ("logps", "old_logps", "advantages")}
        want = run(policy_loss, plain | {"mask": x["mask"]})[2]
        assert logps.grad.dtype == dtype and loss.dtype == torch.float32
        torch.testing.assert_close(logps.grad, (3 * want).to(dtype))


def test_bitwise_repeatable_and_independent_of_threads(device):
    inputs = make(40, 300, device)
    first = run(policy_loss, inputs, loss_type="gspo")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = run(policy_loss, inputs, loss_type="gspo")
            assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    finally:
        torch.set_num_threads(threads)


# ---- dispatcher, compiler, bad input -------------------------------------------------------------


def test_opcheck(device):
    x = make(3, 20, device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
    given = [x[k] for k in ("logps", "old_logps", "advantages", "mask")]
    rest = [x[k] for k in ("ref_logps", "sampling_logps", "entropy")]
    numbers = params.choices("gspo", False), params.settings()
    how = (None, None, 1, False, 1.0)
    op = torch.ops.rlhf_fast.policy_loss
    for wanted in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(op, (*given, None, *rest, *how, *numbers, *wanted))
    cu_seqlens = torch.tensor([0, 25, 60], device=device)
    flat = [t.reshape(-1) for t in given[:3]]
    one = torch.ones((), device=device)
    args = (
        *flat,
        None,
        cu_seqlens,
        None,
        None,
        None,
        one,
        None,
        0,
        True,
        0.5,
        *numbers,
        True,
        False,
    )
    torch.library.opcheck(op, args)


def test_torch_compile_without_graph_breaks(device):
    params = PolicyLossParams(entropy_coef=0.1)

    def loss(logps, old, advantages, mask, entropy):
        out = policy_loss(
            logps * 2, old * 2, advantages, mask=mask, entropy=entropy * 2, params=params
        )
        return out.loss + out.metrics.old_kl_k3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = make(6, 20, device)
    for n in (6, 4):
        args = [x[k][:n] for k in ("old_logps", "advantages", "mask")]
        grads = []
        for function in (compiled, loss):
            logps = x["logps"][:n].clone().requires_grad_()
            entropy = x["entropy"][:n].clone().requires_grad_()
            function(logps, *args, entropy).backward()
            grads.append((logps.grad, entropy.grad))
        torch.testing.assert_close(grads[0], grads[1])


def p(x, old=None, advantages=None, **kwargs):
    advantages = torch.ones(3) if advantages is None else advantages
    settings = {k: kwargs.pop(k) for k in list(kwargs) if k in PolicyLossParams.__annotations__}
    return policy_loss(x, old, advantages, params=PolicyLossParams(**settings), **kwargs)


BAD = {
    "loss_type must be one of": lambda x: p(x, loss_type="poo"),
    r"logps must have shape \(B, T\)": lambda x: p(x[0]),
    "old_logps must have shape": lambda x: p(x, x[:, 1:]),
    r"advantages must have shape \(3,\)": lambda x: p(x, advantages=torch.ones(4)),
    r"advantages must have shape \(3, 10\)": lambda x: p(x, advantages=torch.ones(3, 1)),
    "mask must be bool": lambda x: p(x, mask=torch.ones(3, 10)),
    "mask must be on cpu": lambda x: p(x, mask=torch.ones(3, 10, device="meta").bool()),
    "ref_logps must be given for a coefficient of 0.1": lambda x: p(x, kl_coef=0.1),
    "entropy must be given": lambda x: p(x, entropy_coef=0.1),
    "epsilon_low must lie in": lambda x: p(x, epsilon_low=1.5),
    "epsilon_high must be finite": lambda x: p(x, epsilon_high=-0.1),
    "dual_clip must exceed": lambda x: p(x, dual_clip=1.1),
    "sampling_high must exceed": lambda x: p(x, sampling_low=2.0),
    "kl_estimator must be one of": lambda x: p(x, kl_estimator="k4"),
    "sampling_level must be token for vespo": lambda x: p(
        x, loss_type="vespo", sampling_logps=x, sampling_level="sequence"
    ),
    "aggregation must be one of": lambda x: p(x, aggregation="mean"),
    "kl_coef must be a number": lambda x: p(x, kl_coef=float("nan")),
    "vespo_k_pos must be positive": lambda x: p(x, vespo_k_pos=0.0),
    "normalizer must be positive": lambda x: p(x, normalizer=0),
    r"normalizer must have shape \(\)": lambda x: p(x, normalizer=torch.ones(1)),
    "max_length must be given": lambda x: p(
        x[0], advantages=x[0], cu_seqlens=torch.tensor([0, 10]), loss_type="dr_grpo"
    ),
    "cu_seqlens must rise": lambda x: p(x[0], advantages=x[0], cu_seqlens=torch.tensor([0, 9])),
    "cu_segments must hold the boundaries": lambda x: p(x, cu_segments=torch.tensor([0, 15, 30])),
    "advantages must be finite": lambda x: p(x, advantages=torch.tensor([1.0, torch.nan, 1.0])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    logps = -torch.rand(3, 10)
    with pytest.raises(ValueError, match=rf"policy_loss: .*{message}.*got .*;"):
        BAD[message](logps)


def test_nan_advantage_is_named():
    inputs = make(3, 10)
    inputs["mask"][:] = True
    inputs["advantages"][1, 4] = torch.inf
    with pytest.raises(ValueError, match="got inf at token 4 of sequence 1"):
        run(policy_loss, inputs)
    inputs["mask"][1, 4] = False
    assert run(policy_loss, inputs)[0].isfinite()


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_policy_loss as t\n"
        "for loss_type in t.LOSS_TYPES:\n"
        "  for length in (1, 45): t.test_every_loss_matches_float64('cpu', loss_type, length)\n"
        "t.test_masked_tokens_may_hold_anything('cpu')\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
