"""linear_policy_loss: every loss against float64, and against its split into micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_fast.ops import (
    HeadSettings,
    PolicyLossParams,
    linear_policy_loss,
    linear_policy_loss_ref,
)
from rlhf_fast.ops.head_loss import HeadGradients
from rlhf_fast.ops.policy_params import AGGREGATIONS, LOSS_TYPES, SAMPLING_LEVELS
from tests.ops.heads import check_against_float64, make
from tests.ops.test_linear_logps import DTYPES
from tests.ops.test_linear_preference_loss import offsets

FROZEN = {"trainable": (), "frozen_head": ("weight", "bias")}
LENGTHS = [40, 125, 0, 61, 30, 1, 43]  # the second is cut where chunks hold 128 rows
BUDGETS = {"none": 0, "part": 140 * 333 * 4, "all": 1 << 30}
PARAMS = PolicyLossParams(kl_coef=0.1, entropy_coef=0.05, max_length=130)


def tokens_for(problem, seed=7):
    """Log-probs of other policies near those of this one, and advantages, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    p = problem
    with torch.no_grad():
        logits = torch.nn.functional.linear(p.hidden.double(), p.weight.double())
        index = p.labels.clamp(min=0)[:, None]
        logps = logits.log_softmax(-1).gather(-1, index)[:, 0].float()
    device = logps.device
    near = lambda: logps + 0.3 * torch.randn(logps.shape, generator=generator).to(device)  # noqa: E731
    advantages = torch.randn(logps.shape, generator=generator)
    advantages[::4] = 0.0
    return {
        "old_logps": near(),
        "advantages": advantages.to(device),
        "ref_logps": near(),
        "sampling_logps": near(),
    }


def call(function, problem, tokens, lengths=LENGTHS, **kwargs):
    p = problem
    if p.hidden.dtype == torch.float64:
        tokens = {name: t.double() for name, t in tokens.items()}
    kwargs.setdefault("params", PARAMS)
    return function(
        p.hidden,
        p.weight,
        p.labels,
        bias=p.bias,
        mask=p.mask,
        cu_seqlens=offsets(lengths, p.hidden.device),
        **tokens,
        **kwargs,
    )


def check(problem, budget=0, tokens=None, **kwargs):
    tokens = tokens or tokens_for(problem)

    def fused(p):
        return {
            "loss": call(linear_policy_loss, p, tokens, logits_budget_bytes=budget, **kwargs)[0]
        }

    def plain(p):
        return {"loss": call(linear_policy_loss_ref, p, tokens, **kwargs).loss}

    check_against_float64(problem, fused, plain, {"loss": torch.tensor(3.0)})


def without_clip(params=PARAMS):
    """In bfloat16 the plain path's own error decides on which side of a clip a ratio falls."""
    return replace(params, epsilon_low=1.0, epsilon_high=1e6)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_matches_float64(hardware, loss_type, frozen, dtype, masked, budget):
    problem = make(dtype=dtype, masked=masked, frozen=frozen, device=hardware)
    params = PARAMS if dtype == torch.float32 else without_clip()
    check(problem, budget, loss_type=loss_type, params=params)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_aggregations_over_cut_sequences(hardware, loss_type, aggregation):
    params = replace(PARAMS, aggregation=aggregation)
    for lengths in (LENGTHS, [300], [1] * 300, [127, 1, 128, 44], [0, 260, 0, 0, 40, 0]):
        problem = make(masked=True, device=hardware)
        check(problem, lengths=lengths, loss_type=loss_type, params=params)
        check(problem, lengths=lengths, loss_type=loss_type, params=params, normalizer=71.0)


@pytest.mark.parametrize("loss_type", ["ppo", "grpo", "gspo"])
def test_a_sequence_longer_than_a_chunk(hardware, loss_type):
    """Budget 0 holds 512 rows at most; gspo computes the logits of 560 twice."""
    for frozen in FROZEN.values():
        problem = make(600, frozen=frozen, device=hardware)
        check(problem, lengths=[20, 560, 20], loss_type=loss_type)


@pytest.mark.parametrize("level", SAMPLING_LEVELS)
def test_sampling_corrections(hardware, level):
    check(make(device=hardware), params=replace(PARAMS, sampling_level=level))


def test_on_the_emulated_kernels(device):
    check(make(30, 70, masked=True, device=device), lengths=[11, 9, 10])


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_float32_logits_of_16_bit_inputs(hardware, frozen, loss_type):
    problem = make(dtype=torch.bfloat16, masked=True, frozen=frozen, device=hardware)
    settings = HeadSettings(logits_dtype=torch.float32)
    for budget in BUDGETS.values():
        check(problem, budget, loss_type=loss_type, params=without_clip(), settings=settings)


def test_settings_of_the_head(hardware):
    settings = HeadSettings(temperature=0.8, softcap=20.0, logit_scale=0.5)
    problem = make(bias=True, device=hardware)
    params = PolicyLossParams(entropy_coef=0.1)
    tokens = {"old_logps": None, "advantages": tokens_for(problem)["advantages"]}
    for frozen in FROZEN.values():
        problem.frozen = frozen

        def run(function, p):
            advantages = tokens["advantages"].to(p.hidden.dtype)
            options = {"bias": p.bias, "settings": settings, "params": params}
            offset = offsets(LENGTHS, p.hidden.device)
            found = function(
                p.hidden, p.weight, p.labels, None, advantages, cu_seqlens=offset, **options
            )
            return {"loss": found.loss}

        check_against_float64(
            problem,
            lambda p: run(linear_policy_loss, p),
            lambda p: run(linear_policy_loss_ref, p),
            {"loss": torch.tensor(1.0)},
        )


@pytest.mark.parametrize("loss_type", ["ppo", "grpo", "dr_grpo", "gspo"])
def test_padded_equals_packed(loss_type):
    problem = make(120, masked=True)
    tokens = tokens_for(problem)
    lengths = [30, 30, 30, 30]
    params = replace(PARAMS, max_length=30)
    packed = problem.leaves()
    expected = call(linear_policy_loss, packed, tokens, lengths, loss_type=loss_type, params=params)
    expected.loss.backward()
    leaves = problem.leaves()
    found = linear_policy_loss(
        leaves.hidden.view(4, 30, -1),
        leaves.weight,
        problem.labels.view(4, 30),
        mask=problem.mask.view(4, 30),
        loss_type=loss_type,
        params=replace(params, max_length=None),
        **{name: t.view(4, 30) for name, t in tokens.items()},
    )
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logps.flatten(), expected.logps)
    for got, want in zip(leaves.gradients().values(), packed.gradients().values()):
        torch.testing.assert_close(got, want)


def test_advantages_per_sequence():
    problem = make()
    tokens = tokens_for(problem)
    per_sequence = torch.randn(len(LENGTHS))
    tokens["advantages"] = per_sequence
    found = call(linear_policy_loss, problem, tokens)
    tokens["advantages"] = per_sequence.repeat_interleave(torch.tensor(LENGTHS))
    torch.testing.assert_close(found.loss, call(linear_policy_loss, problem, tokens).loss)


def test_outputs_are_those_of_the_reference():
    problem = make(masked=True)
    tokens = tokens_for(problem)
    got = call(linear_policy_loss, problem, tokens)
    expected = call(linear_policy_loss_ref, problem, tokens)
    torch.testing.assert_close(got.logps, expected.logps)
    live = got.logps != 0
    torch.testing.assert_close(got.entropy[live], expected.entropy[live])
    for name, value in expected.metrics.items():
        torch.testing.assert_close(
            getattr(got.metrics, name), value.float(), rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_split_into_micro_batches_changes_nothing(loss_type):
    problem = make()
    tokens = tokens_for(problem)
    starts = offsets(LENGTHS).tolist()
    results = []
    for split in ([0, 7], [0, 1, 7], [0, 2, 3, 6, 7]):
        leaves, total = problem.leaves(), 0.0
        for first, last in zip(split, split[1:]):
            rows = slice(starts[first], starts[last])
            part = replace(leaves, hidden=leaves.hidden[rows], labels=leaves.labels[rows])
            some = {name: t[rows] for name, t in tokens.items()}
            lengths = LENGTHS[first:last]
            options = {"loss_type": loss_type, "normalizer": 93.0}
            loss = call(linear_policy_loss, part, some, lengths, **options).loss
            loss.backward()
            total += loss.item()
        results.append((total, leaves.gradients()))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        for name, expected in results[0][1].items():
            atol = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=atol)


def test_clipped_tokens_leave_the_products(monkeypatch):
    """Three of four tokens have coefficient 0; the gradient's products see the others alone."""
    problem = make()
    tokens = tokens_for(problem)
    tokens["advantages"] = (torch.arange(300) % 4 == 0).float()
    seen = []
    add = HeadGradients.add

    def counting(self, dlogits, rows):
        seen.append(dlogits.shape[0])
        add(self, dlogits, rows)

    monkeypatch.setattr(HeadGradients, "add", counting)
    leaves = problem.leaves()
    call(linear_policy_loss, leaves, tokens, params=without_clip(PolicyLossParams()))
    assert sum(seen) == 75


@pytest.mark.parametrize("lengths", [[], [0, 0], [5, 4]], ids=["no_rows", "empty", "masked"])
def test_without_live_rows_gradients_are_zero_but_connected(lengths):
    problem = make(sum(lengths), bias=True)
    problem.labels.fill_(-100)
    for loss_type in ("ppo", "gspo", "grpo"):
        leaves = problem.leaves()
        tokens = tokens_for(problem)
        loss = call(linear_policy_loss, leaves, tokens, lengths, loss_type=loss_type).loss
        loss.backward()
        assert loss == 0 and set(leaves.gradients()) == {"hidden", "weight", "bias"}
        assert all((g == 0).all() for g in leaves.gradients().values())


BAD = {
    "loss_type must be one of": lambda p, t: call(linear_policy_loss, p, t, loss_type="pp"),
    "hidden must have shape .B, T, D.": lambda p, t: linear_policy_loss(
        p.hidden, p.weight, p.labels, **t
    ),
    "advantages must have shape": lambda p, t: call(
        linear_policy_loss, p, t | {"advantages": t["advantages"][:5]}
    ),
    "old_logps must have shape": lambda p, t: call(
        linear_policy_loss, p, t | {"old_logps": t["old_logps"][:5]}
    ),
    "max_length must be given": lambda p, t: call(
        linear_policy_loss, p, t, loss_type="dr_grpo", params=PolicyLossParams()
    ),
    "cu_seqlens must rise from 0": lambda p, t: call(linear_policy_loss, p, t, lengths=[3, 4]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    problem = make()
    with pytest.raises(ValueError, match=f"linear_policy_loss: .*{message}.*got .*;"):
        BAD[message](problem, tokens_for(problem))
