"""DPO against a hand-computed example and its properties."""

import math

import pytest
import torch

from rlhf_fast.losses import dpo_loss


def test_hand_computed():
    # h = 0.5 * ((-1 - -2) - (-3 - -2.5)) = 0.75
    result = dpo_loss(*map(torch.tensor, ([-1.0], [-3.0], [-2.0], [-2.5])), beta=0.5)
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
