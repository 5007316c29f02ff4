"""Losses with rewards or weights of tokens, by hand and against float64 autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from rlhf_fast.losses import contrastive_token_rewards, dpo_loss, treg_loss, wpo_weights


def make(lengths, seed=0):
    """Log-probs, the reference's and rewards of (2B, 7) tokens, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -torch.rand(2, len(lengths), 7, generator=generator)
    rewards = torch.rand(len(lengths), 7, generator=generator) - 0.5
    return logps, ref_logps, rewards, torch.arange(7) < torch.tensor(lengths)[:, None]


def independent(logps, ref_logps, rewards, mask, beta, alpha):
    """The formula on float64 rows, chosen before rejected."""
    chosen, rejected = ((logps - ref_logps) * mask).sum(1).chunk(2)
    h = beta * (chosen - rejected)
    agreement = sum((rewards * logps * mask).sum(1).chunk(2))
    return -logsigmoid(h) - alpha * beta * torch.sigmoid(-h).detach() * agreement


def test_treg_by_hand():
    # h = 0.5 * ((-3 - -2) - (-2 - -2)) = -0.5; agreement = 0.25 * -1 - 0.5 * -2 + 0.5 * -2
    logps = torch.tensor([[-1.0, -2.0], [-2.0, torch.nan]], requires_grad=True)
    ref_sums, rewards = torch.tensor([-2.0, -2.0]), torch.tensor([[0.25, -0.5], [0.5, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    out = treg_loss(logps, ref_sums, rewards, mask=mask, beta=0.5, alpha=0.1)
    wrong = 1 / (1 + math.exp(-0.5))
    want = math.log1p(math.exp(0.5)) - 0.1 * wrong * 0.5 * -0.25
    assert out.loss.item() == pytest.approx(want, rel=1e-6)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-0.5, 0.0)
    out.loss.sum().backward()
    slope, pull = 0.5 * wrong, 0.1 * wrong * 0.5
    grads = [[-slope - pull * 0.25, -slope + pull * 0.5], [slope - pull * 0.5, 0.0]]
    torch.testing.assert_close(logps.grad, torch.tensor(grads))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.integers(1, 3).flatmap(
        lambda n: st.lists(st.integers(0, 7), min_size=2 * n, max_size=2 * n)
    ),
    alpha=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_treg_matches_float64_rows_packed_and_interleaved(lengths, alpha):
    logps, ref_logps, rewards, mask = make(lengths)
    truth = logps.double().requires_grad_()
    wants = independent(truth, ref_logps.double(), rewards.double(), mask, 0.1, alpha)
    (want,) = torch.autograd.grad(wants.sum(), truth)
    order = torch.arange(len(lengths)).view(2, -1).t().flatten()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for pick, kwargs in (
        (slice(None), {"mask": mask}),
        (order, {"mask": mask[order], "interleaved": True}),
        (mask, {"cu_seqlens": cu_seqlens}),
    ):
        leaf = logps[pick].clone().requires_grad_()
        out = treg_loss(leaf, ref_logps[pick], rewards[pick], alpha=alpha, **kwargs)
        torch.testing.assert_close(out.loss.double(), wants.detach(), rtol=1e-5, atol=1e-6)
        (got,) = torch.autograd.grad(out.loss.sum(), leaf)
        torch.testing.assert_close(got.double(), want[pick], rtol=1e-5, atol=1e-7)


def test_treg_without_its_term_is_dpo_and_alpha_is_checked():
    logps, ref_logps, rewards, _ = make([7, 7])
    out = treg_loss(logps, ref_logps, rewards, alpha=0.0)
    sums = (x.sum()[None] for x in (*logps, *ref_logps))
    torch.testing.assert_close(out.loss, dpo_loss(*sums).loss)
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1; 0 is DPO"):
        treg_loss(logps, ref_logps, rewards, alpha=-1)


def test_contrastive_token_rewards_by_hand():
    better = torch.tensor([0.0, -1.0, -50.0], requires_grad=True)
    got = contrastive_token_rewards(better, torch.tensor([-math.log(3), -1.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([0.25, 0.0, -0.5]))
    assert not got.requires_grad


def test_wpo_weights_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -9.0], [-0.1, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    log_sum_p2 = torch.full((2, 3), -1.0)
    weights = wpo_weights(logps, log_sum_p2, mask=mask)
    torch.testing.assert_close(weights, torch.tensor([-0.5, 0.9]).exp())
    assert not weights.requires_grad
    assert wpo_weights(logps, log_sum_p2, mask=mask, maximum=1.0)[1] == 1.0
