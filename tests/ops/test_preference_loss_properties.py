"""preference_loss: properties of the losses, edge cases, bad input, and torch's machinery."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import (
    PREFERENCE_LOSSES,
    PairData,
    PreferenceParams,
    preference_loss,
    unpaired_preference_loss,
)
from rlhf_fast.ops.preference_inputs import DIVERGENCES, TRAITS
from tests.ops.test_preference_loss import gradient, make, plain_params, settings_of

BY_DIFFERENCE = [name for name in TRAITS if "margin" in TRAITS[name] and name != "dpop"]


@pytest.mark.parametrize("loss_type", BY_DIFFERENCE)
def test_equal_policies_give_the_loss_of_h_0(device, loss_type):
    """With pi = ref every log-ratio is 0: ln 2 for the logistic ones."""
    if "reference" not in TRAITS[loss_type]:
        return
    (chosen, rejected, *_), data = make(loss_type, device=device)
    out = preference_loss(
        chosen, rejected, chosen, rejected, loss_type=loss_type, data=data,
        params=plain_params(loss_type),
    )  # fmt: skip
    want = {"hinge": 1.0, "ipo": 25.0, "ipo_sum": 25.0}.get(loss_type, math.log(2))
    if loss_type == "exo_pair":
        want = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    if loss_type == "discopop":
        want = 0.5 * math.log(2) + 0.5
    assert out.loss.item() == pytest.approx(want, rel=1e-6)
    assert (out.margins == 0).all() and (out.accuracies == 0).all()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    loss_type=st.sampled_from(PREFERENCE_LOSSES),
    seed=st.integers(0, 1000),
    num_pairs=st.integers(1, 20),
)
def test_order_of_pairs_does_not_matter(loss_type, seed, num_pairs):
    tensors, data = make(loss_type, num_pairs, seed=seed)
    order = torch.randperm(num_pairs)
    kwargs = {"loss_type": loss_type, "params": plain_params(loss_type)}
    first = preference_loss(*tensors, data=data, **kwargs)
    shuffled = PairData(*(None if t is None else t[order] for t in data))
    second = preference_loss(*(t[order] for t in tensors), data=shuffled, **kwargs)
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(second.margins, first.margins[order])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    loss_type=st.sampled_from(BY_DIFFERENCE), seed=st.integers(0, 1000), shift=st.integers(-9, 9)
)
def test_only_the_difference_of_scores_matters(loss_type, seed, shift):
    """A shift that both scores share changes nothing (the prompt's log-partition cancels)."""
    tensors, data = make(loss_type, 8, seed=seed)
    kwargs = {"loss_type": loss_type, "data": data, "params": plain_params(loss_type)}
    moved = [t.clone() for t in tensors]
    by_length = "lengths" in TRAITS[loss_type]
    moved[0] += shift * (data.chosen_lengths if by_length else 1)
    moved[1] += shift * (data.rejected_lengths if by_length else 1)
    want = preference_loss(*tensors, reduction="none", **kwargs).loss
    got = preference_loss(*moved, reduction="none", **kwargs).loss
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "aot", "cpo", "bradley_terry"])
def test_beta_near_0_forgets_the_pairs(device, loss_type):
    tensors, data = make(loss_type, device=device)
    out = preference_loss(*tensors, loss_type=loss_type, beta=1e-9, data=data)
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_aot_compares_sorted_batches(device):
    """The pairs' own order is forgotten: any re-pairing of the reference gives the same loss."""
    tensors, _ = make("aot", device=device)
    order = torch.randperm(37, device=device)
    moved = [*tensors[:2], *(t[order] for t in tensors[2:])]
    first, second = (preference_loss(*t, loss_type="aot").loss for t in (tensors, moved))
    torch.testing.assert_close(first, second)
    plain = preference_loss(*tensors)
    got = preference_loss(*tensors, loss_type="aot")
    torch.testing.assert_close(got.margins, plain.margins, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.means, plain.means, rtol=1e-5, atol=1e-5)


def test_extreme_log_ratios_stay_finite(device):
    far = torch.tensor([-1e4, 1e4, 0.0], device=device)
    zero = torch.zeros(3, device=device)
    for loss_type in PREFERENCE_LOSSES:
        if "reference" not in TRAITS[loss_type] or loss_type == "discopop":
            continue
        data = PairData(*(torch.ones(3, device=device),) * 2)
        for divergence in DIVERGENCES if "divergence" in TRAITS[loss_type] else ("reverse_kl",):
            if loss_type in ("ipo", "ipo_sum") and divergence != "reverse_kl":
                continue  # the square of e^80
            e = 0.1 if loss_type == "exo_pair" else 0.0
            params = PreferenceParams(f_divergence=divergence, label_smoothing=e)
            kwargs = {"loss_type": loss_type, "data": data, "params": params}
            chosen, rejected = far.clone().requires_grad_(), zero.clone().requires_grad_()
            out = preference_loss(chosen, rejected, zero, zero, **kwargs)
            out.loss.backward()
            for t in (out.loss, chosen.grad, rejected.grad):
                assert t.isfinite().all(), (loss_type, divergence)


def test_probability_1_under_orpo_has_a_finite_gradient(device):
    chosen = torch.zeros(2, device=device, requires_grad=True)
    lengths = torch.ones(2, device=device)
    out = preference_loss(
        chosen, torch.tensor([0.0, -1.0], device=device), loss_type="orpo",
        data=PairData(lengths, lengths),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and chosen.grad.isfinite().all()


def test_lengths_of_0_count_as_1(device):
    tensors, _ = make("simpo", 2, device)
    results = [
        preference_loss(
            *tensors, loss_type="simpo", data=PairData(*(torch.tensor(n, device=device),) * 2)
        ).loss
        for n in ([0, 3], [1, 3])
    ]
    assert torch.equal(*results)


def test_empty_batch_is_zero_and_connected(device):
    chosen = torch.zeros(0, device=device, requires_grad=True)
    empty = torch.zeros(0, device=device)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        out = preference_loss(chosen, empty, empty, empty, reduction=reduction)
        assert out.loss.shape == shape and out.loss.sum() == 0 and (out.means == 0).all()
        out.loss.sum().backward()
        assert chosen.grad.shape == (0,)


def test_nan_log_probs_propagate(device):
    tensors, _ = make("sigmoid", 4, device)
    tensors[0][2] = torch.nan
    out = preference_loss(*tensors, reduction="none")
    assert out.loss.isnan().tolist() == [False, False, True, False]
    assert preference_loss(*tensors).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_log_probs_are_computed_in_float32(device, dtype):
    tensors, _ = make("sigmoid", device=device)
    narrow = [t.to(dtype) for t in tensors]
    out = preference_loss(*narrow)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, preference_loss(*(t.float() for t in narrow)).loss)
    assert gradient(preference_loss, narrow)[0].dtype == dtype


def test_strided_halves_are_read_where_they_lie(device):
    tensors, _ = make("sigmoid", device=device)
    together = torch.stack(tensors[:2], 1).requires_grad_()
    reference = torch.stack(tensors[2:], 1)
    out = preference_loss(*together.unbind(1), *reference.unbind(1))
    assert torch.equal(out.loss, preference_loss(*tensors).loss)
    out.loss.backward()
    torch.testing.assert_close(together.grad[:, 0], gradient(preference_loss, tensors)[0] / 0.5)
    expanded = torch.tensor(-3.0, device=device).expand(37)
    got, want = (
        preference_loss(tensors[0], t, *tensors[2:]).loss for t in (expanded, expanded + 0)
    )
    assert torch.equal(got, want)


def test_split_into_micro_batches_changes_nothing(device):
    tensors, _ = make("sigmoid", 32, device)
    whole = gradient(preference_loss, tensors, reduction="sum")[0]
    parts = [
        gradient(preference_loss, [t[i : i + 8] for t in tensors], reduction="sum")[0]
        for i in range(0, 32, 8)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_repeatable_and_independent_of_threads(device):
    tensors, _ = make("sigmoid", 3000, device)
    first = preference_loss(*tensors)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = preference_loss(*tensors)
            assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    tensors, kwargs = settings_of("sigmoid", device)
    data, is_chosen = kwargs["data"], torch.ones(37, dtype=torch.bool, device=device)
    numbers = [0.0, 0.1, *(0.0,) * 7, 1.0, 1.0]
    columns = [*tensors[2:], *(None if t is None else t.float() for t in data)]
    op = torch.ops.rlhf_fast.preference_loss_forward
    torch.library.opcheck(op, (*tensors[:2], columns, None, "sigmoid", numbers, 1.0))
    columns = [tensors[2], *(None,) * 7]
    torch.library.opcheck(op, (tensors[0], None, columns, is_chosen, "kto", numbers, 1.0))


def test_torch_compile_without_graph_breaks(device):
    def loss(chosen, rejected, reference, weights):
        data = PairData(weights=weights)
        out = preference_loss(chosen * 2, rejected, reference, reference, data=data)
        return out.loss + 0.0 * out.means.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (6, 4):
        chosen, rejected, reference, weights = torch.rand(4, n, device=device).unbind()
        x = chosen.clone().requires_grad_()
        compiled(x, rejected, reference, weights).backward()
        plain = chosen.clone().requires_grad_()
        loss(plain, rejected, reference, weights).backward()
        torch.testing.assert_close(x.grad, plain.grad)


P, D = PreferenceParams, PairData
BAD = {
    "loss_type must be one of": lambda c, r: preference_loss(c, r, c, r, loss_type="dpo"),
    "reduction must be one of": lambda c, r: preference_loss(c, r, c, r, reduction="avg"),
    "beta must be positive": lambda c, r: preference_loss(c, r, c, r, beta=0.0),
    r"rejected_logps must have shape \(3,\)": lambda c, r: preference_loss(c, r[:2], c, r),
    r"chosen_logps must have shape \[B\]": lambda c, r: preference_loss(c[None], r, c, r),
    "ref_chosen_logps must be float32": lambda c, r: preference_loss(c, r, c.double(), r),
    "ref_chosen_logps must be given": lambda c, r: preference_loss(c, r),
    "ref_rejected_logps must be given": lambda c, r: preference_loss(c, r, c),
    "ref_chosen_logps must be left out": lambda c, r: preference_loss(c, r, c, r, loss_type="cpo"),
    "ref_rejected_logps must be on cpu": lambda c, r: preference_loss(c, r, c, r.to("meta")),
    "data.chosen_lengths must be given": lambda c, r: preference_loss(c, r, c, r, loss_type="ipo"),
    "given for 'sigmoid' with nll_weight": lambda c, r: preference_loss(
        c, r, c, r, params=P(nll_weight=1.0)
    ),
    r"data.baseline must have shape \(\)": lambda c, r: preference_loss(
        c, r, c, r, loss_type="kto", data=D(baseline=c)
    ),
    r"data.weights must have shape \(3,\)": lambda c, r: preference_loss(
        c, r, c, r, data=D(weights=c[:2])
    ),
    r"label_smoothing must lie in \[0, 0.5\)": lambda c, r: P(label_smoothing=0.5),
    "label_smoothing must be positive": lambda c, r: preference_loss(
        c, r, c, r, loss_type="exo_pair"
    ),
    "label_smoothing must be left out": lambda c, r: preference_loss(
        c, r, c, r, loss_type="hinge", params=P(label_smoothing=0.1)
    ),
    "f_divergence must be one of": lambda c, r: P(f_divergence="kl"),
    "f_divergence must be left out": lambda c, r: preference_loss(
        c, r, c, r, loss_type="nca_pair", params=P(f_divergence="forward_kl")
    ),
    "margin must be finite": lambda c, r: P(margin=math.nan),
    "nll_weight must be at least 0": lambda c, r: P(nll_weight=-1.0),
    "discopop_tau must be positive": lambda c, r: P(discopop_tau=0.0),
    "dpop_penalty must be left out": lambda c, r: preference_loss(
        c, r, c, r, params=P(dpop_penalty=1.0)
    ),
    "data.weights, nll_weight and center_weight must be left out": lambda c, r: preference_loss(
        c, r, c, r, loss_type="aot", data=D(weights=c)
    ),
    "is_chosen must be bool": lambda c, r: unpaired_preference_loss(c, r, c),
    "is_chosen must be left out": lambda c, r: unpaired_preference_loss(
        c, c > 0, c, loss_type="sigmoid"
    ),
    "ref_logps must be given": lambda c, r: unpaired_preference_loss(c, c > 0),
    "center_weight must be 0 for single": lambda c, r: unpaired_preference_loss(
        c, c > 0, c, params=P(center_weight=1.0)
    ),
    r"targets must lie in \[0, 1\]": lambda c, r: preference_loss(
        c, r, c, r, data=D(targets=c - 9)
    ),
    "weights must not be negative or NaN": lambda c, r: preference_loss(
        c, r, c, r, data=D(weights=c * torch.nan)
    ),
    "margins must not be NaN": lambda c, r: preference_loss(
        c, r, c, r, data=D(margins=c * torch.nan)
    ),
    "lengths must not be negative": lambda c, r: preference_loss(
        c, r, c, r, loss_type="ipo", data=D(c - 9, r)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    chosen, rejected = torch.rand(2, 3)
    with pytest.raises(ValueError, match="preference_loss: .*got .*;"):
        BAD[message](chosen, rejected)
    with pytest.raises(ValueError, match=message):
        BAD[message](chosen, rejected)
