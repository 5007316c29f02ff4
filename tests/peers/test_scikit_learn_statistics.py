"""Statistics that scikit-learn, and the SciPy that it brings, have as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from scipy.stats import rankdata
from sklearn.metrics import mean_pinball_loss

from rlhf_fast.losses import n_step_returns
from rlhf_fast.ops import group_advantages, reward_regression_loss

pytestmark = pytest.mark.peers


def test_same_quantile_loss():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(40, 3, generator=generator)
    targets = torch.randn(40, generator=generator)
    levels = torch.tensor([0.1, 0.5, 0.8])
    got = reward_regression_loss(predictions, targets, loss_type="quantile", levels=levels)
    columns = zip(predictions.T.numpy(), levels.tolist())
    want = [mean_pinball_loss(targets.numpy(), x, alpha=level) for x, level in columns]
    assert got.item() == pytest.approx(sum(want) / 3, rel=1e-5)


def test_same_ranks():
    rewards = torch.tensor([0.3, 0.1, 0.3, 0.9, 0.1, 0.1, 2.0, -1.0])
    for count in (2, 4, 8):
        got = group_advantages(rewards, estimator="rank", num_generations=count)
        ranks = rankdata(rewards.view(-1, count).numpy(), axis=1) - 1
        torch.testing.assert_close(
            got, torch.from_numpy(ranks / (count - 1) - 0.5).float().flatten()
        )


@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_same_n_step_returns(num_steps):
    """Discounted sums of the next rewards are a finite impulse response, in reversed time."""
    rewards, values = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    lengths, gamma = (9, 5, 1, 7), 0.9
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    got = n_step_returns(rewards, values, mask, num_steps=num_steps, gamma=gamma)
    for row, length in enumerate(lengths):
        r, v = (x[row, :length].double().numpy() for x in (rewards, values))
        want = lfilter(gamma ** np.arange(num_steps), 1.0, r[::-1])[::-1].copy()
        want[: max(length - num_steps, 0)] += gamma**num_steps * v[num_steps:]
        np.testing.assert_allclose(got[row, :length].numpy(), want, rtol=1e-5, atol=1e-6)
