"""OpenRLHF's losses, patched and not."""

from __future__ import annotations

import pytest
import torch
from openrlhf import models
from openrlhf.models import loss as losses

from rlhf_fast.integrations import openrlhf

pytestmark = pytest.mark.peers
ROWS = 5


def both(call):
    expected = call()
    with openrlhf.patch():
        got = call()
    assert len(got) == len(expected)
    for i, (ours, theirs) in enumerate(zip(got, expected)):
        if theirs is None:
            assert ours is None, i
            continue
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.mark.parametrize("where", [models, losses], ids=["models", "models.loss"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.6}, {"ipo": True}]
)
def test_dpo_loss(where, options):
    logps = [torch.randn(ROWS) * 20 for _ in range(4)]

    def call():
        chosen, rejected = (t.clone().requires_grad_() for t in logps[:2])
        out = where.DPOLoss(0.1, **options)(chosen, rejected, *logps[2:])
        out[0].backward()
        return *(t.detach() for t in out), chosen.grad, rejected.grad

    both(call)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_pairwise_loss(with_margin, shape):
    rewards, margin = torch.randn(2, *shape) * 3, torch.rand(shape)

    def call():
        chosen, rejected = (t.clone().requires_grad_() for t in rewards)
        loss = models.PairWiseLoss()(chosen, rejected, margin if with_margin else None)
        loss.backward()
        return loss.detach(), chosen.grad, rejected.grad

    both(call)


def test_classes_stay_what_they_are():
    original = models.DPOLoss
    with openrlhf.patch():
        assert models.DPOLoss is losses.DPOLoss is not original
        assert models.DPOLoss.__name__ == "DPOLoss"
        assert isinstance(models.DPOLoss(0.1), original)
    assert models.DPOLoss is losses.DPOLoss is original
