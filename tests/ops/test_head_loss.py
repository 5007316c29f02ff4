"""The one-pass head under a loss of the tests' own, against float64 and against its split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlhf_fast.ops import linear_logps_ref
from rlhf_fast.ops.head import Head
from rlhf_fast.ops.head_inputs import HeadSettings, prepare
from rlhf_fast.ops.head_loss import HeadGradients, head_loss
from tests.ops.heads import check_against_float64, make
from tests.ops.test_linear_logps import DTYPES, FROZEN


def advantages_for(problem):
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(problem.labels.shape, generator=generator)
    return advantages.masked_fill(torch.arange(len(advantages)) % 4 == 1, 0.0)


def token_loss(logps, entropy, advantages):
    """Clipped ratio with an entropy bonus where there is an advantage; a sum over rows."""
    ratio = (logps + 6.0).exp().clamp(max=3.0)
    bonus = (advantages != 0) * 0.1 * entropy
    return -(ratio * advantages + bonus).sum()


def sequence_loss(logps, advantages, bounds):
    """A loss of sums over groups of rows."""
    sums = [(logps[a:b] * advantages[a:b]).sum() for a, b in zip(bounds, bounds[1:])]
    return torch.nn.functional.softplus(torch.stack(sums) / 100).sum()  # empty ones count as well


def fused(problem, bounds=None, loss=None, budget=0):
    rows = prepare(
        "test",
        problem.hidden,
        problem.weight,
        problem.labels,
        problem.bias,
        problem.mask,
        HeadSettings(temperature=0.9),
        ("logps", "entropy"),
    )
    advantages = rows.gather(advantages_for(problem).to(problem.hidden.device))

    def of_rows(seen, part):
        return token_loss(seen["logps"], seen["entropy"], advantages[part])

    return head_loss(rows, loss or of_rows, ("logps", "entropy"), budget, bounds)


def plain(problem):
    p = problem
    found = linear_logps_ref(
        p.hidden,
        p.weight,
        p.labels,
        bias=p.bias,
        mask=p.mask,
        temperature=0.9,
        outputs=("logps", "entropy"),
    )
    live = p.labels != -100
    live = live if p.mask is None else live & p.mask
    advantages = advantages_for(p).to(p.hidden.device)[live]
    return found.logps[live], found.entropy[live], advantages


@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("budget", [0, 400_000, 1 << 30], ids=["none", "part", "all"])
def test_matches_float64(hardware, budget, frozen, dtype, masked):
    problem = make(1100, dtype=dtype, masked=masked, bias=True, frozen=frozen, device=hardware)
    check_against_float64(
        problem,
        lambda p: {"loss": fused(p, budget=budget)[0]},
        lambda p: {"loss": token_loss(*plain(p))},
        {"loss": torch.tensor(0.37)},
    )


BOUNDS = {
    "short": [0, 40, 41, 41, 130, 200, 360, 600],
    "long": [0, 560, 600],  # longer than a chunk: computed twice
    "one": [0, 600],
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_units_are_seen_whole(hardware, frozen, bounds):
    problem = make(600, frozen=frozen, device=hardware)
    advantages = advantages_for(problem).to(hardware)

    def grouped(p):
        def loss(seen, units):
            inside = bounds[units.start : units.stop + 1]
            rows = slice(inside[0], inside[-1])
            return sequence_loss(seen["logps"], advantages[rows], [b - inside[0] for b in inside])

        return {"loss": fused(p, bounds, loss)[0]}

    def whole(p):
        logps, _, advantages = plain(p)
        return {"loss": sequence_loss(logps, advantages, bounds)}

    check_against_float64(problem, grouped, whole, {"loss": torch.tensor(2.0)})


def test_a_16_bit_weight_gradient_is_rounded_few_times(monkeypatch):
    """Sums over chunks: rounded after each of a few, else in float32 and rounded once."""
    dtypes, add = [], HeadGradients.add
    monkeypatch.setattr(
        HeadGradients,
        "add",
        lambda self, *args: (dtypes.append(self.weight.dtype), add(self, *args)),
    )
    small, large = torch.bfloat16, torch.float32
    for num_rows, budget, dtype in ((2048, 0, small), (2048, 40_000, large), (9200, 0, large)):
        dtypes.clear()
        problem = make(num_rows, vocab=300, width=24, dtype=torch.bfloat16)
        check_against_float64(
            problem,
            lambda p, budget=budget: {"loss": fused(p, budget=budget)[0]},
            lambda p: {"loss": token_loss(*plain(p))},
            {"loss": torch.tensor(1.0)},
        )
        assert len(dtypes) > 10 and set(dtypes) == {dtype}


def test_a_frozen_head_needs_no_whole_units(monkeypatch):
    """Nor a second product for the logits, however long the units are."""
    sizes, logits = [], Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda self, out: (sizes.append(out.numel()), logits(self, out))[1]
    )
    bounds, leaves = [0, 560, 600], make(600, frozen=("weight",)).leaves()
    loss = lambda seen, units: sequence_loss(seen["logps"], torch.ones(600), bounds)  # noqa: E731
    fused(leaves, bounds, loss)[0].backward()
    assert sum(sizes) == 600 * 333 and max(sizes) <= 64 * 600


def test_statistics_are_those_of_linear_logps():
    problem = make(masked=True)
    _, seen = fused(problem)
    logps, entropy, _ = plain(problem)
    torch.testing.assert_close(seen["logps"], logps)
    torch.testing.assert_close(seen["entropy"], entropy)
    assert not seen["logps"].requires_grad


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    monkeypatch.setattr("rlhf_fast.ops.head_loss._OnePass._backward", None)
    with torch.no_grad():
        loss, _ = fused(make().leaves())
    assert not loss.requires_grad


def test_second_backward_is_refused():
    leaves = make().leaves()
    loss, _ = fused(leaves)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward must run once"):
        loss.backward()


@pytest.mark.parametrize("num_rows", [0, 9])
def test_without_live_rows_gradients_are_zero_but_connected(num_rows):
    problem = make(num_rows, bias=True)
    problem.labels.fill_(-100)
    leaves = problem.leaves()
    loss, _ = fused(leaves)
    loss.backward()
    assert loss == 0 and set(leaves.gradients()) == {"hidden", "weight", "bias"}
    assert all((g == 0).all() for g in leaves.gradients().values())


def gradients_of(run):
    leaves = make(masked=True).leaves()
    run(leaves).backward()
    return leaves.gradients()


def test_activation_checkpointing():
    expected = gradients_of(lambda p: 2 * fused(p)[0])

    def checkpointed(p):
        def of_hidden(hidden):
            return fused(replace(p, hidden=hidden))[0]

        return 2 * checkpoint(of_hidden, p.hidden, use_reentrant=False)

    for name, got in gradients_of(checkpointed).items():
        torch.testing.assert_close(got, expected[name])


def test_tied_weights():
    """Hidden states that depend on the weight: its gradient is a sum over both ways."""
    results = []
    for function in (lambda p: fused(p)[0], lambda p: token_loss(*plain(p))):
        leaves = make().leaves()
        embedded = torch.tanh(leaves.weight[leaves.labels % 50])
        function(replace(leaves, hidden=embedded)).backward()
        results.append(leaves.weight.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients():
    expected = gradients_of(lambda p: fused(p)[0])

    def run(p):
        with torch.autocast("cpu", torch.bfloat16):
            return fused(p)[0]

    for name, got in gradients_of(run).items():
        assert got.dtype == torch.float32
        error = (got - expected[name]).square().mean().sqrt()
        assert 0 < error < 0.03 * expected[name].square().mean().sqrt()
