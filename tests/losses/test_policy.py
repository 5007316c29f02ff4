"""Advantages and shaped rewards against hand-computed examples."""

import pytest
import torch

from rlhf_fast.losses import (
    keep_high_entropy,
    oreal_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    token_rewards,
)
from rlhf_fast.ops import PolicyLossParams, policy_loss

MASK = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards(estimator):
    logps = torch.full((3, 3), -1.0)
    ref_logps = torch.tensor([-1.5, -1.0, -0.5]).expand(3, 3)
    delta = torch.tensor([0.5, 0.0, -0.5])
    kl = {"k1": delta, "k2": delta**2 / 2, "k3": torch.exp(-delta) - 1 + delta}[estimator]
    rewards = torch.tensor([10.0, 20.0, 30.0])
    got = token_rewards(rewards, logps, ref_logps, MASK, kl_coef=0.1, kl_estimator=estimator)
    want = -0.1 * kl * MASK
    want[0, 1] += 10
    want[1, 2] += 20
    torch.testing.assert_close(got, want)


def test_reinforce_plus_plus():
    rewards = torch.tensor([[0.0, 8.0, 7.0], [5.0, 0.0, 4.0], [9.0, 9.0, 9.0]])
    got = reinforce_plus_plus_advantages(rewards, MASK, gamma=0.5)
    returns = torch.tensor([[4.0, 8.0, 0.0], [0.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    x = returns[MASK]
    want = ((returns - x.mean()) / x.std()).masked_fill(~MASK, 0.0)
    torch.testing.assert_close(got, want)


def test_remax_is_reinforce_with_a_greedy_baseline():
    advantages = remax_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    loss = policy_loss(logps, None, advantages, loss_type="remax").loss
    assert loss.item() == pytest.approx((0.5 * 3 - 0.5 * 7) / 2)


def test_oreal_weights_what_speaks_for_the_outcome():
    scores = torch.tensor([[100.0, -100.0, 0.0]]).expand(2, 3)
    is_right = torch.tensor([True, False])
    got = oreal_advantages(torch.tensor([1.0, -0.5]), scores, is_right)
    assert got.tolist() == [[1.0, 0.0, 0.0], [-0.0, -0.5, -0.0]]


def test_keep_high_entropy():
    entropy = torch.tensor([[5.0, 4.0, 9.0], [9.0, 3.0, 2.0], [9.0, 9.0, 9.0]])
    got = keep_high_entropy(torch.ones(3), entropy, MASK, 0.5)
    assert got.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert (keep_high_entropy(torch.ones(3), entropy, MASK[2:].expand(3, 3), 0.5) == 0).all()
    with pytest.raises(ValueError, match="share must lie in"):
        keep_high_entropy(torch.ones(3), entropy, MASK, 0.0)
    # Where it is 0 the policy term vanishes, the KL term stays.
    params = PolicyLossParams(kl_coef=1.0, kl_estimator="k1")
    logps = torch.zeros(3, 3, requires_grad=True)
    policy_loss(logps, None, got, mask=MASK, ref_logps=logps - 1, params=params).loss.backward()
    assert logps.grad[1, 1] == pytest.approx(1 / 4) and logps.grad[0, 0] == pytest.approx(0.0)
