"""Advantages and shaped rewards against hand-computed examples."""

import pytest
import torch

from rlhf_fast.losses import (
    clip_cov_advantages,
    drawn_covariances,
    highest_covariances,
    keep_high_entropy,
    kl_cov_penalty,
    mask_off_policy_sequences,
    n_step_returns,
    oreal_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    token_covariances,
    token_rewards,
)
from rlhf_fast.ops import PolicyLossParams, gae, policy_loss

MASK = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_by_hand(estimator):
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


def test_reinforce_plus_plus_by_hand():
    rewards = torch.tensor([[0.0, 8.0, 7.0], [5.0, 0.0, 4.0], [9.0, 9.0, 9.0]])
    got = reinforce_plus_plus_advantages(rewards, MASK, gamma=0.5)
    returns = torch.tensor([[4.0, 8.0, 0.0], [0.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    x = returns[MASK]
    want = ((returns - x.mean()) / x.std()).masked_fill(~MASK, 0.0)
    torch.testing.assert_close(got, want)


def test_remax_by_hand():
    advantages = remax_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    loss = policy_loss(logps, None, advantages, loss_type="remax").loss
    assert loss.item() == pytest.approx((0.5 * 3 - 0.5 * 7) / 2)


def test_oreal_by_hand():
    scores = torch.tensor([[100.0, -100.0, 0.0]]).expand(2, 3)
    is_right = torch.tensor([True, False])
    got = oreal_advantages(torch.tensor([1.0, -0.5]), scores, is_right)
    assert got.tolist() == [[1.0, 0.0, 0.0], [-0.0, -0.5, -0.0]]


def test_keep_high_entropy_by_hand():
    entropy = torch.tensor([[5.0, 4.0, 9.0], [9.0, 3.0, 2.0], [9.0, 9.0, 9.0]])
    got = keep_high_entropy(torch.ones(3), entropy, MASK, 0.5)
    assert got.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert (keep_high_entropy(torch.ones(3), entropy, MASK[2:].expand(3, 3), 0.5) == 0).all()
    with pytest.raises(ValueError, match="share must lie in"):
        keep_high_entropy(torch.ones(3), entropy, MASK, 0.0)
    # Divided by the kept tokens it is the mean over these alone.
    logps, advantages = torch.rand(3, 3), torch.randn(3)
    kept = keep_high_entropy(advantages, entropy, MASK, 0.5)
    loss = policy_loss(logps, None, kept, mask=MASK, normalizer=0.5 * MASK.sum()).loss
    alone = policy_loss(logps, None, advantages, mask=got > 0).loss
    torch.testing.assert_close(loss, alone)
    # Where it is 0 the policy term vanishes, the KL term stays.
    params = PolicyLossParams(kl_coef=1.0, kl_estimator="k1")
    logps = torch.zeros(3, 3, requires_grad=True)
    policy_loss(logps, None, got, mask=MASK, ref_logps=logps - 1, params=params).loss.backward()
    assert logps.grad[1, 1] == pytest.approx(1 / 4) and logps.grad[0, 0] == pytest.approx(0.0)


# Means over the four tokens that count: A 0, logp -2. Covariances 3, -1, 0 and 4.
COV_A = torch.tensor([[3.0, -1.0, 99.0], [77.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
COV_LOGPS = torch.tensor([[-1.0, -1.0, -9.0], [-9.0, -2.0, -4.0], [0.0, 0.0, 0.0]])


def test_token_covariances_by_hand():
    want = torch.tensor([[3.0, -1.0, 0.0], [0.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_covariances(COV_A, COV_LOGPS, MASK), want)
    assert (token_covariances(COV_A, COV_LOGPS, torch.zeros_like(MASK)) == 0).all()


def test_clip_cov_by_hand():
    clip = lambda **kwargs: clip_cov_advantages(COV_A, COV_LOGPS, MASK, **kwargs)  # noqa: E731
    kept = clip(share=1.0)
    assert kept[0, 0] == kept[1, 2] == 0 and kept[0, 1] == -1 and kept[1, 1] == 0
    assert clip(share=1.0, high=3.5)[1, 2] == -2
    seen = set()
    for seed in range(30):
        one = clip(share=1e-6, generator=torch.Generator().manual_seed(seed))
        seen.add((one[0, 0].item(), one[1, 2].item()))
    assert seen == {(0.0, -2.0), (3.0, 0.0)}
    spared = COV_A == 3
    drawn = drawn_covariances(COV_A, COV_LOGPS, MASK, share=1.0, spared=spared)
    assert drawn.nonzero().tolist() == [[1, 2]]
    for wrong in ({"share": 0.0}, {"low": 5.0}):
        with pytest.raises(ValueError, match="drawn_covariances: .*got"):
            clip(**wrong)


def test_kl_cov_by_hand():
    logps = COV_LOGPS.clone().requires_grad_()
    old_logps = COV_LOGPS + 0.5
    penalty = kl_cov_penalty(COV_A, logps, old_logps, MASK, share=0.5, coef=2.0)
    penalty.backward()
    assert penalty.item() == pytest.approx(2.0 * (0.5 + 0.5) / 4)
    want = torch.tensor([[-0.5, 0.0, 0.0], [0.0, 0.0, -0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(logps.grad, want)
    worst = highest_covariances(COV_A, COV_LOGPS, MASK, share=0.5)
    assert torch.equal(worst, want < 0)
    nothing = kl_cov_penalty(COV_A, logps, old_logps, torch.zeros_like(MASK))
    assert nothing == 0
    with pytest.raises(ValueError, match="share must lie in"):
        kl_cov_penalty(COV_A, logps, old_logps, MASK, share=2.0)


def test_masked_off_policy_sequences_by_hand():
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    old_logps = torch.tensor([[0.3, 0.1], [0.3, 0.1], [0.1, 0.1], [0.1, 9.0]])
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    got = mask_off_policy_sequences(advantages, torch.zeros(4, 2), old_logps, mask, threshold=0.15)
    assert got.tolist() == [0.0, 1.0, -1.0, -1.0]
    old_logps[0] = torch.tensor([0.4, float("nan")])  # 0.2 in the mean of both
    got = mask_off_policy_sequences(advantages, torch.zeros(4, 2), old_logps, mask, threshold=0.15)
    assert got.tolist() == [0.0, 1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        mask_off_policy_sequences(advantages, old_logps, old_logps, mask, threshold=-1.0)


def test_n_step_returns_by_hand():
    rewards = torch.tensor([[1.0, 50.0, 2.0, 4.0], [3.0, 5.0, 50.0, 50.0]])
    values = torch.tensor([[10.0, 99.0, 20.0, 40.0], [30.0, 60.0, 99.0, 99.0]])
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    one = n_step_returns(rewards, values, mask, num_steps=1, gamma=0.5)
    assert one.tolist() == [[11.0, 0.0, 22.0, 4.0], [33.0, 5.0, 0.0, 0.0]]
    two = n_step_returns(rewards, values, mask, num_steps=2, gamma=0.5)
    assert two.tolist() == [[12.0, 0.0, 4.0, 4.0], [5.5, 5.0, 0.0, 0.0]]
    for gamma in (0.5, 1.0, 0.0):
        every = n_step_returns(rewards, values, mask, num_steps=9, gamma=gamma)
        want = gae(rewards, None, gamma=gamma, lam=1.0, mask=mask).returns
        torch.testing.assert_close(every, want)
        td = gae(rewards, values, gamma=gamma, lam=0.0, mask=mask).returns
        torch.testing.assert_close(
            n_step_returns(rewards, values, mask, num_steps=1, gamma=gamma), td
        )
    for wrong in ({"num_steps": 0}, {"num_steps": 1, "gamma": 2.0}):
        with pytest.raises(ValueError, match="n_step_returns: .*got"):
            n_step_returns(rewards, values, mask, **wrong)
