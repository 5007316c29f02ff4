"""The bridge itself: gradients taken in advance, and when the dispatcher is called."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rlhf_fast import ops
from rlhf_fast.ops import native


def taken(upstream_is_one: bool):
    x, gradient = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    loss = native.one_pass(torch.tensor(3.0), [x], [gradient])
    return x, gradient, loss if upstream_is_one else 2 * loss


@pytest.mark.parametrize("upstream_is_one", [True, False])
def test_backward_multiplies_with_the_upstream_gradient(upstream_is_one):
    x, gradient, loss = taken(upstream_is_one)
    want = gradient * (1 if upstream_is_one else 2)
    loss.backward(retain_graph=True)
    assert torch.equal(x.grad, want)
    loss.backward()  # accumulates in place: what is kept for it must not change
    assert torch.equal(x.grad, 2 * want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_that_was_changed_is_not_handed_on_again():
    x, _, loss = taken(True)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    gradient.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_losses_may_be_changed_in_place():
    logps = torch.randn(3, 7, requires_grad=True)
    loss = ops.policy_loss(logps, None, torch.ones(3), loss_type="reinforce").loss
    loss /= 4
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.full((3, 7), -1 / 21 / 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(device, dtype):
    x, y = torch.randn(2, 4, 6, device=device, dtype=torch.float32)
    weight, labels = x.new_ones(9, 6).cumsum(0) / 9, x.new_ones(4, 6).long()

    def losses():
        hidden = torch.stack((x, y), 2).repeat(1, 1, 3)
        yield ops.policy_loss(x, y, x, normalizer=3.0).loss
        yield ops.value_loss(x, y, normalizer=3.0).loss
        desensitised = ops.PreferenceParams(ld_alpha=0.3)
        yield ops.token_preference_loss(x, y, mask=x > 0, params=desensitised).loss
        yield ops.linear_policy_loss(hidden, weight, labels, y, x, normalizer=3.0).loss
        yield ops.kl(x, y).sum()

    want = list(losses())
    torch.set_default_dtype(dtype)
    try:
        got = list(losses())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, want))


def test_plain_tensors_alone_pass_the_dispatcher_by():
    x = torch.randn(2, 3)
    assert native.is_plain(x) and native.is_plain(torch.nn.Parameter(x))
    seen = []
    torch.func.vmap(lambda row: seen.append(native.is_plain(row)) or row)(x)
    with FakeTensorMode() as mode:
        seen.append(native.is_plain(mode.from_tensor(x)))
        assert ops.gae(mode.from_tensor(x)).returns.shape == (2, 3)
    assert seen == [False, False]
