"""token_preference_loss: from tokens to loss and back, packed = padded = sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import (
    PairData,
    PreferenceParams,
    preference_loss,
    preference_loss_ref,
    token_preference_loss,
)

LENGTHS = [5, 1, 9, 7, 4, 0]  # chosen, then rejected; one response is empty


def make(lengths=LENGTHS, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    padded = -torch.rand(2, len(lengths), 9, generator=generator)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return padded.to(device), mask.to(device), cu_seqlens.to(device)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "simpo", "aot", "sft"])
def test_equals_sums_by_hand(device, loss_type):
    (logps, ref), mask, _ = make(device=device)
    logps = logps.requires_grad_()
    has_reference = loss_type not in ("simpo", "sft")
    out = token_preference_loss(
        logps, ref if has_reference else None, mask=mask, loss_type=loss_type
    )
    (got,) = torch.autograd.grad(out.loss, logps)
    double = logps.detach().double().requires_grad_()
    sums = [(x.double() * mask).sum(1) for x in ((double, ref) if has_reference else (double,))]
    lengths = mask.sum(1)
    data = PairData(lengths[:3], lengths[3:])
    halves = [half for x in sums for half in (x[:3], x[3:])]
    truth = preference_loss_ref(*halves, loss_type=loss_type, data=data)
    (want,) = torch.autograd.grad(truth.loss, double)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert (got[~mask] == 0).all()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.integers(0, 9), min_size=2 * n, max_size=2 * n)
    ),
    ld_alpha=st.sampled_from([1.0, 0.5, 0.0]),
    nll_weight=st.sampled_from([0.0, 1.0]),
)
def test_packed_equals_padded(device, lengths, ld_alpha, nll_weight):
    (padded, ref), mask, cu_seqlens = make(lengths, device)
    params = PreferenceParams(ld_alpha=ld_alpha, nll_weight=nll_weight)
    leaves = padded.clone().requires_grad_(), padded[mask].clone().requires_grad_()
    rows = token_preference_loss(leaves[0], ref, mask=mask, params=params)
    packed = token_preference_loss(leaves[1], ref[mask], cu_seqlens=cu_seqlens, params=params)
    torch.testing.assert_close(packed.loss, rows.loss)
    rows.loss.backward()
    packed.loss.backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad[mask])


def test_interleaved_pairs(device):
    (logps, ref), mask, _ = make(device=device)
    order = torch.arange(6, device=device).view(2, 3).t().flatten()
    for params in (PreferenceParams(), PreferenceParams(ld_alpha=0.3)):
        halves = token_preference_loss(logps, ref, mask=mask, params=params)
        mixed = token_preference_loss(
            logps[order], ref[order], mask=mask[order], interleaved=True, params=params
        )
        for a, b in zip(halves, mixed):
            torch.testing.assert_close(a, b)


def test_reference_sums_may_come_from_before(device):
    (logps, ref), mask, _ = make(device=device)
    sums = (ref * mask).sum(1)
    got, want = (token_preference_loss(logps, r, mask=mask).loss for r in (sums, ref))
    torch.testing.assert_close(got, want)


def test_length_desensitised_by_hand(device):
    """Chosen of 3 tokens, rejected of 1: the chosen one's last two count a half."""
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, 0.0, 0.0]], device=device)
    mask = torch.tensor([[True, True, True], [True, False, False]], device=device)
    out = token_preference_loss(
        logps, torch.zeros_like(logps), mask=mask, params=PreferenceParams(ld_alpha=0.5)
    )
    zero = torch.zeros(1, device=device)
    want = preference_loss(
        *(torch.tensor([x], device=device) for x in (-1 + 0.5 * -6.0, -3.0)), zero, zero
    )
    torch.testing.assert_close(out.loss, want.loss)


def test_a_mask_inside_packed_sequences(device):
    (logps, ref), mask, _ = make([9] * 6, device)
    counted = torch.rand(6, 9, device=device) < 0.6
    cu_seqlens = torch.arange(0, 55, 9, device=device)
    params = PreferenceParams(ld_alpha=0.5, nll_weight=1.0)
    rows = token_preference_loss(logps, ref, mask=counted, params=params)
    packed = token_preference_loss(
        logps.flatten(),
        ref.flatten(),
        cu_seqlens=cu_seqlens,
        mask=counted.flatten(),
        params=params,
    )
    torch.testing.assert_close(packed.loss, rows.loss)


def test_everything_masked_is_ln_2_and_connected(device):
    (logps, ref), mask, _ = make(device=device)
    logps = logps.requires_grad_()
    out = token_preference_loss(logps, ref, mask=torch.zeros_like(mask))
    out.loss.backward()
    torch.testing.assert_close(out.loss, torch.tensor(2.0, device=device).log())
    assert (logps.grad == 0).all()


def test_torch_compile_without_graph_breaks(device):
    def loss(logps, ref, cu_seqlens):
        return token_preference_loss(logps, ref, cu_seqlens=cu_seqlens).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [3, 4]):
        (padded, ref), mask, cu_seqlens = make(lengths, device)
        leaves = [padded[mask].clone().requires_grad_() for _ in range(2)]
        compiled(leaves[0], ref[mask], cu_seqlens).backward()
        loss(leaves[1], ref[mask], cu_seqlens).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_opcheck(device):
    (logps, ref), mask, cu_seqlens = make(device=device)
    numbers = [0.0, 0.1, *(0.0,) * 7, 1.0, 1.0]
    op = torch.ops.rlhf_fast.token_preference_loss_forward
    rest = (False, "sigmoid", numbers, 0.5)
    weights = torch.rand_like(logps)
    torch.library.opcheck(op, (logps, ref, mask, weights, None, [None] * 8, *rest, True))
    sums = [*torch.rand(2, 3, device=device), *(None,) * 6]
    packed = logps[mask], None, None, None, cu_seqlens
    torch.library.opcheck(op, (*packed, sums, *rest, False))


def test_repeatable_and_independent_of_threads(device):
    (logps, ref), mask, _ = make([9, 3, 0, 7] * 40, device)
    leaf = logps.requires_grad_()
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = token_preference_loss(leaf, ref, mask=mask)
            seen.append((out.loss, out.means, *torch.autograd.grad(out.loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in seen[1:] for a, b in zip(seen[0], again))


def test_empty_batch_is_zero_and_connected(device):
    logps = torch.empty(0, 5, device=device, requires_grad=True)
    out = token_preference_loss(logps, torch.empty(0, 5, device=device))
    out.loss.backward()
    assert out.loss.item() == 0.0 and logps.grad.shape == (0, 5)


def test_masked_tokens_may_hold_anything(device):
    (logps, ref), mask, _ = make(device=device)
    want = token_preference_loss(logps, ref, mask=mask).loss
    logps, ref = (x.masked_fill(~mask, torch.nan).requires_grad_() for x in (logps, ref))
    got = token_preference_loss(logps, ref, mask=mask).loss
    got.backward()
    assert torch.equal(got.detach(), want) and logps.grad.isfinite().all() and ref.grad is None


def test_bad_input_is_refused():
    (logps, ref), mask, _ = make()
    for message, call in {
        "as many rejected as chosen": lambda: token_preference_loss(logps[1:], ref[1:]),
        "logps must have shape": lambda: token_preference_loss(logps[0], ref),
        "ref_logps must have shape": lambda: token_preference_loss(logps, ref[:, :4]),
        "ref_logps must be on cpu": lambda: token_preference_loss(logps, ref.to("meta")),
        "beta must be positive": lambda: token_preference_loss(logps, ref, beta=0.0),
        "loss_type must be one of": lambda: token_preference_loss(logps, ref, loss_type="dpo"),
        "data.weights must have shape": lambda: token_preference_loss(
            logps, ref, data=PairData(weights=torch.ones(2))
        ),
        "cu_seqlens must rise": lambda: token_preference_loss(
            logps[0], ref[0], cu_seqlens=torch.tensor([0, 4, 8])
        ),
        "mask must be bool": lambda: token_preference_loss(logps, ref, mask=mask.float()),
        "ref_chosen_logps must be given": lambda: token_preference_loss(logps, mask=mask),
        "ld_alpha must lie in": lambda: PreferenceParams(ld_alpha=2.0),
        "ld_alpha must be left out for sums": lambda: preference_loss(
            *torch.rand(4, 3), params=PreferenceParams(ld_alpha=0.5)
        ),
    }.items():
        with pytest.raises(ValueError, match=f"{message}.*got .*;"):
            call()
