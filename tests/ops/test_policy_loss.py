"""policy_loss by hand and against float64 autograd, on every kernel."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.ops import PolicyLossParams, policy_loss, policy_loss_ref
from rlhf_fast.ops.policy_params import AGGREGATIONS, KL_CORRECTIONS, LOSS_TYPES
from tests.ops.policy_batches import check, make, packed, run

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
    "dppo_tv": (1.5, -1.5),
    "dppo_kl": (1.5, -1.5),
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


# The probabilities move from e^-1 / 2 to e^-1, and from 2 e^-2 to e^-2: by 0.184 and -0.135; the KL
# of "this token or another" is 0.081 and 0.064.
@pytest.mark.parametrize(
    ("loss_type", "epsilon", "wants"),
    [
        ("dppo_tv", 0.15, (0.5, -1.5)),
        ("dppo_tv", 0.1, (0.5, -1.0)),
        ("dppo_kl", 0.07, (0.5, -1.5)),
        ("dppo_kl", 0.05, (0.5, -1.0)),
    ],
)
def test_dppo_leaves_out_what_moves_too_far(device, loss_type, epsilon, wants):
    params = PolicyLossParams(epsilon_low=epsilon, epsilon_high=epsilon)
    for sign, want in zip((1.0, -1.0), wants):
        logps = torch.tensor([[-1.0, -2.0]], device=device, requires_grad=True)
        old_logps = logps.detach() - torch.tensor([[LN2, -LN2]], device=device)
        advantages = torch.tensor([sign], device=device)
        out = policy_loss(logps, old_logps, advantages, loss_type=loss_type, params=params)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(want, rel=2e-6)
        kept = [want not in (0.5,), want not in (-1.0,)]
        expected = [-sign * ratio / 2 * k for ratio, k in zip((2.0, 0.5), kept)]
        assert logps.grad.tolist() == [pytest.approx(expected, rel=1e-5)]
        cut = out.metrics.clip_high if sign > 0 else out.metrics.clip_low
        assert cut.item() == 1 - sum(kept) / 2


@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
def test_dppo_weighs_with_a_bounded_ratio(device, loss_type):
    params = PolicyLossParams(dual_clip=1.3)
    for sign in (1.0, -1.0):
        logps = torch.tensor([[-1.0, -2.0]], device=device, requires_grad=True)
        old_logps = logps.detach() - torch.tensor([[LN2, -LN2]], device=device)
        advantages = torch.tensor([sign], device=device)
        out = policy_loss(logps, old_logps, advantages, loss_type=loss_type, params=params)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(sign * (1.3 + 0.5 * 2) / 2, rel=2e-6)
        assert logps.grad.tolist() == [pytest.approx([-sign * 1.3 / 2, -sign * 0.25], rel=1e-5)]
        assert out.metrics.clip_dual.item() == 0.5


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


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_matches_float64(device, loss_type):
    """Whole vectors that do not count, with and without one advantage per sequence."""
    inputs = make(6, 90, device, spread=0.05)
    lengths = torch.tensor([90, 0, 1, 16, 33, 70], device=device)
    inputs["mask"] = torch.arange(90, device=device) < lengths[:, None]
    names = ("logps", "old_logps", "advantages", "mask")
    plain = {k: inputs[k] for k in names}
    kwargs = dict(loss_type=loss_type, normalizer=1.0)
    check(plain, **kwargs)
    check(plain | {"advantages": inputs["advantages"][:, 0].clone()}, **kwargs)
    check(inputs, params=PolicyLossParams(kl_coef=0.1, entropy_coef=0.01), **kwargs)


@pytest.mark.parametrize("ratio_level", LEVELS)
@pytest.mark.parametrize("loss_type", ["ppo", "cispo", "sapo", "gmpo", "gspo_token", "dro"])
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


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_a_reference_far_away_counts_in_full(device, estimator):
    inputs = make(5, 40, device)
    inputs["ref_logps"][::2] -= 200.0
    for correction in KL_CORRECTIONS[:2]:
        params = PolicyLossParams(kl_coef=0.1, kl_estimator=estimator, kl_correction=correction)
        loss, _, gradient, _ = run(policy_loss, inputs, params=params)
        wanted, _, of_ref, _ = run(policy_loss_ref, inputs, torch.float64, params=params)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(gradient.double(), of_ref, rtol=1e-5, atol=1e-7)


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
    for loss_type in ("ppo", "gspo", "rloo", "dro"):
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


# ---- on a GPU alone ------------------------------------------------------------------------------


def loss_and_gradient(inputs, loss_type="grpo"):
    logps = inputs["logps"].detach().clone().requires_grad_()
    rest = {name: inputs[name] for name in ("mask", "ref_logps")}
    out = policy_loss(logps, inputs["old_logps"], inputs["advantages"], loss_type=loss_type, **rest)
    return out.loss, *torch.autograd.grad(out.loss, logps)


def test_cuda_graph(gpu):
    """The last block of a launch finishes the sums, in every replay anew."""
    inputs = make(7, 300, gpu)
    loss_and_gradient(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = loss_and_gradient(inputs)
    for _ in range(3):
        inputs["logps"].mul_(0.9)
        graph.replay()
        want = loss_and_gradient(inputs)
        torch.cuda.synchronize()
        for g, w in zip(got, want):
            assert torch.equal(g, w)


def test_two_streams(gpu):
    """Each has a count of blocks of its own."""
    batches = [make(64, 500, gpu, seed=seed) for seed in range(2)]
    want = [loss_and_gradient(batch) for batch in batches]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in batches], []
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got.append((number, loss_and_gradient(batches[number])))
    torch.cuda.synchronize()
    for number, found in got:
        for g, w in zip(found, want[number]):
            assert torch.equal(g, w)
