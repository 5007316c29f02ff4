"""List losses and reward-model losses against hand-computed examples."""

import math

import pytest
import torch

from rlhf_fast.losses import (
    contrastive_loss,
    k_wise_loss,
    lipo_loss,
    pro_loss,
    rrhf_loss,
    smooth_labels,
)

GROUP = torch.tensor([0, 2])


def test_lipo_of_pairs_by_hand():
    logps, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.5])
    rewards = torch.tensor([1.0, 0.0])
    dpo = math.log1p(math.exp(-0.75))
    got = lipo_loss(logps, ref, rewards, GROUP, beta=0.5, loss_type="pairwise_logistic")
    assert got.item() == pytest.approx(dpo, rel=1e-6)
    weight = (2 - 1) * (1 / math.log(2) - 1 / math.log(3))
    assert lipo_loss(logps, ref, rewards, GROUP, beta=0.5).item() == pytest.approx(weight * dpo)


def test_rrhf_by_hand():
    logps, lengths = torch.tensor([-4.0, -1.0]), torch.tensor([4, 2])
    rewards = torch.tensor([2.0, 1.0])
    # means -1 and -0.5: the better one is less likely
    assert rrhf_loss(logps, lengths, rewards, GROUP).item() == pytest.approx(0.5 + 1.0)
    assert rrhf_loss(logps, lengths, -rewards, GROUP).item() == pytest.approx(0.0 + 0.5)


def test_pro_by_hand():
    logps, lengths = torch.tensor([-4.0, -1.0]), torch.tensor([4, 2])
    rewards = torch.tensor([3.0, 1.0])
    want = math.log(math.exp(-2.0) + math.exp(-1.0)) + 2.0 + 0.05
    assert pro_loss(logps, lengths, rewards, GROUP).item() == pytest.approx(want, rel=1e-6)


def test_k_wise_by_hand():
    rewards, ranks = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1, 2, 0])
    total = math.e**2 + math.e + 1
    want = -math.log(math.e**2 / total * math.e / (math.e + 1))
    got = k_wise_loss(rewards, ranks, torch.tensor([0, 3]))
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_smoothed_labels_by_hand():
    targets = torch.tensor([1.0, 1.0])
    got = smooth_labels(targets, torch.tensor([0.0, 9.0]), torch.tensor([0.0, -9.0]), rate=0.4)
    torch.testing.assert_close(got, torch.tensor([0.8, 1.0]))
    with pytest.raises(ValueError, match="rate must lie in"):
        smooth_labels(targets, targets, targets, rate=1.5)


def test_contrastive_loss_by_hand():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    want = math.log1p(math.exp(-1 / 0.5))
    got = contrastive_loss(features, features * 5, temperature=0.5)
    assert got.item() == pytest.approx(want, rel=1e-6)
    assert contrastive_loss(features, features.flip(0), temperature=0.5) > got
