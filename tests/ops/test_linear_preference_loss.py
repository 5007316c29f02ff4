"""linear_preference_loss: every loss against float64, and against its split into micro-batches."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import (
    PREFERENCE_LOSSES,
    HeadSettings,
    PairData,
    PreferenceParams,
    linear_preference_loss,
    linear_preference_loss_ref,
)
from rlhf_fast.ops.preference_inputs import TRAITS
from tests.ops.heads import check_against_float64, make
from tests.ops.test_linear_logps import DTYPES

FROZEN = {"trainable": (), "frozen_head": ("weight", "bias")}
LENGTHS = [40, 25, 60, 61, 0, 12, 30, 33, 1, 1, 20, 17]  # chosen and rejected, six pairs
NUM_PAIRS = len(LENGTHS) // 2
BUDGETS = {"none": 0, "part": 130 * 333 * 4, "all": 1 << 30}
PARAMS = {
    "exo_pair": PreferenceParams(label_smoothing=0.1),
    "robust": PreferenceParams(label_smoothing=0.1),
    "dpop": PreferenceParams(dpop_penalty=0.5),
    "simpo": PreferenceParams(margin=0.3),
}


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def references(loss_type, count=NUM_PAIRS, device="cpu"):
    if "reference" not in TRAITS[loss_type]:
        return (None, None)
    generator = torch.Generator().manual_seed(9)
    return (-60 * torch.rand(2, count, generator=generator)).to(device).unbind()


def call(function, problem, loss_type="sigmoid", lengths=LENGTHS, refs=None, **kwargs):
    p, device = problem, problem.hidden.device
    refs = references(loss_type, len(lengths) // 2, device) if refs is None else refs
    if p.hidden.dtype == torch.float64:
        refs = [None if t is None else t.double() for t in refs]
    return function(
        p.hidden,
        p.weight,
        p.labels,
        offsets(lengths, device),
        *refs,
        bias=p.bias,
        mask=p.mask,
        loss_type=loss_type,
        **kwargs,
    )


def check(problem, budget=0, **kwargs):
    check_against_float64(
        problem,
        lambda p: {
            "loss": call(linear_preference_loss, p, logits_budget_bytes=budget, **kwargs).loss
        },
        lambda p: {"loss": call(linear_preference_loss_ref, p, **kwargs).loss},
        {"loss": torch.tensor(3.0)},
    )


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_matches_float64(hardware, loss_type, frozen, dtype, masked, budget):
    problem = make(dtype=dtype, masked=masked, bias=True, frozen=frozen, device=hardware)
    params = PARAMS.get(loss_type, PreferenceParams())
    check(problem, budget, loss_type=loss_type, params=params, num_pairs=17)


def test_on_the_emulated_kernels(device):
    problem = make(30, 70, masked=True, device=device)
    check(problem, lengths=[5, 6, 4, 3, 7, 5])


def test_settings_and_data_per_pair(hardware):
    problem = make(device=hardware)
    settings = HeadSettings(temperature=0.8, softcap=20.0, logit_scale=0.5)
    weights = torch.rand(NUM_PAIRS, device=hardware)
    data = PairData(weights=weights, targets=weights.flip(0))
    check(problem, settings=settings, data=data, params=PreferenceParams(nll_weight=0.2))


def test_a_pair_longer_than_a_chunk_is_computed_twice(hardware):
    """Budget 0 holds 512 rows at most, the second pair has 560."""
    problem = make(600, device=hardware)
    for frozen in FROZEN.values():
        problem.frozen = frozen
        check(problem, lengths=[10, 20, 280, 280, 5, 5])


def test_outputs_are_those_of_the_reference():
    problem = make(masked=True)
    got = call(linear_preference_loss, problem)
    expected = call(linear_preference_loss_ref, problem)
    for name in ("chosen_logps", "rejected_logps"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    for name in got.pairs._fields:
        torch.testing.assert_close(getattr(got.pairs, name), getattr(expected.pairs, name))
    torch.testing.assert_close(got.pairs.loss, got.loss.detach())


# "sorted" losses compare pairs with each other; sft's mean is over the tokens of a call
SPLITTABLE = [n for n in PREFERENCE_LOSSES if "sorted" not in TRAITS[n] and n != "sft"]


@pytest.mark.parametrize("loss_type", SPLITTABLE)
def test_the_split_into_micro_batches_changes_nothing(loss_type):
    problem = make()
    params = PARAMS.get(loss_type, PreferenceParams())
    kwargs = {"loss_type": loss_type, "params": params, "num_pairs": NUM_PAIRS}
    refs = references(loss_type)
    starts = offsets(LENGTHS).tolist()
    results = []
    for split in ([0, 6], [0, 1, 6], [0, 2, 3, 5, 6]):
        leaves, total = problem.leaves(), 0.0
        for first, last in zip(split, split[1:]):
            part = make()
            rows = slice(starts[2 * first], starts[2 * last])
            part.hidden, part.labels = leaves.hidden[rows], leaves.labels[rows]
            part.weight = leaves.weight
            lengths = LENGTHS[2 * first : 2 * last]
            some = [None if t is None else t[first:last] for t in refs]
            loss = call(linear_preference_loss, part, lengths=lengths, refs=some, **kwargs).loss
            loss.backward()
            total += loss.item()
        results.append((total, leaves.gradients()))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        for name, expected in results[0][1].items():
            atol = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("lengths", [[], [0, 0], [5, 4]], ids=["no_pairs", "empty", "masked"])
def test_without_live_rows_gradients_are_zero_but_connected(lengths):
    problem = make(sum(lengths), bias=True)
    problem.labels.fill_(-100)
    leaves = problem.leaves()
    loss = call(linear_preference_loss, leaves, lengths=lengths).loss
    loss.backward()
    assert set(leaves.gradients()) == {"hidden", "weight", "bias"}
    assert all((g == 0).all() for g in leaves.gradients().values())
    if lengths:
        expected = call(linear_preference_loss_ref, problem, lengths=lengths).loss
        torch.testing.assert_close(loss.detach(), expected)


BAD = {
    "hidden must have shape .N, D.": lambda p: linear_preference_loss(
        p.hidden[None], p.weight, p.labels[None], offsets(LENGTHS)
    ),
    "sequences must come in pairs": lambda p: call(
        linear_preference_loss, p, lengths=[100, 100, 100], refs=(None, None)
    ),
    "num_pairs must be positive": lambda p: call(linear_preference_loss, p, num_pairs=0),
    "cu_seqlens must rise from 0": lambda p: call(linear_preference_loss, p, lengths=[3, 4]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=f"linear_preference_loss: .*{message}.*got .*;"):
        BAD[message](make())
