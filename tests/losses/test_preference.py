"""Preference losses against hand-computed examples, and their properties."""

import math

import pytest
import torch

from rlhf_fast.losses import (
    SelfRevisionLogRatios,
    cpl_loss,
    dpo_loss,
    inpo_loss,
    kto_loss,
    nash_md_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
    srpo_loss,
    xpo_loss,
)


def tensors(*values):
    return [torch.tensor([v]) for v in values]


def test_hand_computed():
    # h = 0.5 * ((-1 - -2) - (-3 - -2.5)) = 0.75
    result = dpo_loss(*tensors(-1.0, -3.0, -2.0, -2.5), beta=0.5)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-0.75)), rel=1e-6)
    assert result.chosen_rewards.item() == pytest.approx(0.5)
    assert result.rejected_rewards.item() == pytest.approx(-0.25)


def test_equal_policies_give_ln_2_whatever_the_smoothing():
    chosen, rejected = torch.randn(8), torch.randn(8)
    for smoothing in (0.0, 0.3):
        result = dpo_loss(chosen, rejected, chosen, rejected, label_smoothing=smoothing)
        torch.testing.assert_close(result.loss, torch.full((8,), math.log(2)))


def test_gradient_is_beta_times_the_probability_of_being_wrong():
    chosen = torch.tensor([-1.0], requires_grad=True)
    result = dpo_loss(chosen, torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([-1.0]))
    result.loss.backward()
    assert chosen.grad.item() == pytest.approx(-0.1 * 0.5)


def test_inpo_by_hand():
    # h = (-1 - -3) - 0.25 * (-2 - -2.5) - 0.75 * (-1.5 - -2.5) = 1.125
    chosen, rejected, *others = tensors(-1.0, -3.0, -2.0, -2.5, -1.5, -2.5)
    result = inpo_loss(chosen, rejected, tuple(others[:2]), tuple(others[2:]), eta=2.0, tau=0.5)
    assert result.loss.item() == pytest.approx((1.125 - 0.25) ** 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, eta\], got 3.0"):
        inpo_loss(chosen, rejected, tuple(others[:2]), tuple(others[2:]), eta=2.0, tau=3.0)


def test_xpo_by_hand():
    args = [torch.tensor([x, x]) for x in (-1.0, -3.0, -2.0, -2.5)]
    chosen, rejected = args[0].requires_grad_(), args[1].requires_grad_()
    result = xpo_loss(*args, torch.tensor([True, False]), beta=0.5, alpha=0.1)
    plain = math.log1p(math.exp(-0.75))
    torch.testing.assert_close(result.loss, torch.tensor([plain - 0.1, plain - 0.3]))
    result.loss.sum().backward()
    wrong = 0.5 / (1 + math.exp(0.75))
    torch.testing.assert_close(chosen.grad, torch.tensor([0.1 - wrong, -wrong]))
    torch.testing.assert_close(rejected.grad, torch.tensor([wrong, 0.1 + wrong]))


def test_nash_md_by_hand():
    logps = torch.tensor([-2.0], requires_grad=True)
    loss = nash_md_loss(logps, torch.tensor([-1.0]), torch.tensor([0.7]), tau=0.1)
    assert loss.item() == pytest.approx(-(0.2 + 0.1) * -2)
    loss.sum().backward()
    assert logps.grad.item() == pytest.approx(-0.3)


def test_srpo_at_its_solution_and_by_hand():
    # 2P - 1 = 2 beta (w|l - l|l) = -2 beta (l|w - w|w) = beta (w|l - l|w - l + w)
    solution = SelfRevisionLogRatios(*tensors(0.0, 0.0, 5.0, 0.0, -5.0, 0.0))
    assert srpo_loss(solution, beta=0.1).item() == pytest.approx(0.0, abs=1e-12)
    other = SelfRevisionLogRatios(*tensors(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    want = 0.75 * (1 - 0.1 * (3 - 5 - 2 + 1)) ** 2
    want += 0.25 * ((0.5 - 0.1 * (3 - 4)) ** 2 + (-0.5 - 0.1 * (5 - 6)) ** 2)
    assert srpo_loss(other, beta=0.1, alpha=0.25).item() == pytest.approx(want, rel=1e-6)


def test_cpl_by_hand():
    chosen = torch.tensor([-3.0, -1.0], requires_grad=True)
    rejected = torch.tensor([-4.0, -2.0], requires_grad=True)
    out = cpl_loss(chosen, rejected, alpha=0.5, bias=0.5)
    h = [0.5 * (-3 + 2), 0.5 * (-1 + 1)]
    want = [math.log1p(math.exp(-x)) for x in h]
    torch.testing.assert_close(out.loss, torch.tensor(want))
    out.loss.sum().backward()
    slope = [-0.5 / (1 + math.exp(x)) for x in h]
    torch.testing.assert_close(chosen.grad, torch.tensor(slope))
    torch.testing.assert_close(rejected.grad, -0.5 * torch.tensor(slope))
    with pytest.raises(ValueError, match="bias must lie in"):
        cpl_loss(chosen, rejected, bias=1.5)


def test_slic_by_hand():
    chosen, rejected, answer = tensors(-1.0, -1.5, -4.0)
    result = slic_loss(chosen, rejected, answer, delta=2.0, regularization=0.5)
    assert result.loss.item() == pytest.approx(2.0 - 0.5 + 0.5 * 4)
    assert slic_loss(chosen, rejected, delta=0.4).loss.item() == 0.0


def test_orpo_and_simpo_by_hand():
    args = tensors(-1.0, -3.0, 2, 4)
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (-0.5, -0.75)]
    want = 0.5 + 0.3 * math.log1p(odds[1] / odds[0])
    assert orpo_loss(*args, beta=0.3).loss.item() == pytest.approx(want, rel=1e-6)
    want = math.log1p(math.exp(-(2 * (-0.5 + 0.75) - 0.6)))
    assert simpo_loss(*args, gamma=0.6).loss.item() == pytest.approx(want, rel=1e-6)


def test_kto_by_hand():
    logps, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.5])
    labels = torch.tensor([True, False])
    settings = {"beta": 0.5, "desirable_weight": 2.0}
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for kl, kept in ((0.4, 0.4), (-3.0, 0.0)):
        result = kto_loss(logps, ref, labels, torch.tensor(kl), **settings)
        want = [2 * (1 - sigmoid(0.5 * (1 - kept))), 1 - sigmoid(0.5 * (kept + 0.5))]
        assert result.loss.tolist() == pytest.approx(want, rel=1e-6)
