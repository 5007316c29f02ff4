"""How ops are differentiated: gradients taken in advance; second order and forward mode refused."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from rlhf_fast import ops
from rlhf_fast.ops import autograd
from tests.test_layout import PACKAGE


def offsets(x, *values):
    return torch.tensor(values, device=x.device)


# name -> a scalar of x, with constants c; both [4, 7]
DIFFERENTIABLE = {
    "logps": lambda x, c, labels: ops.logps(x, labels).logps.sum(),
    "kl": lambda x, c, labels: ops.kl(x, c).sum(),
    "kl_top_k": lambda x, c, labels: ops.kl_top_k(x, labels[:, None], -c[:, :1].abs()).sum(),
    "linear_logps": lambda x, c, labels: ops.linear_logps(x, c, labels % 4).logps.sum(),
    "linear_policy_loss": lambda x, c, labels: (
        ops.linear_policy_loss(x[None], c, labels[None] % 4, None, c[:1, :4]).loss
    ),
    "linear_preference_loss": lambda x, c, labels: (
        ops.linear_preference_loss(x, c, labels % 4, offsets(x, 0, 2, 4), loss_type="cpo").loss
    ),
    "policy_loss": lambda x, c, labels: ops.policy_loss(x, c, c).loss,
    "value_loss": lambda x, c, labels: ops.value_loss(x, c).loss,
    "preference_loss": lambda x, c, labels: (
        ops.preference_loss(x[:, 0], x[:, 1], loss_type="cpo").loss
    ),
    "unpaired_preference_loss": lambda x, c, labels: (
        ops.unpaired_preference_loss(x[:, 0], labels > 2, c[:, 0]).loss
    ),
    "token_preference_loss": lambda x, c, labels: ops.token_preference_loss(x, c).loss,
    "list_loss": lambda x, c, labels: ops.list_loss(x[:, 0], c[:, 0], offsets(x, 0, 4)),
    "reward_model_loss": lambda x, c, labels: ops.reward_model_loss(x[:, 0], x[:, 1]).loss,
    "reward_regression_loss": lambda x, c, labels: ops.reward_regression_loss(x, c),
    "segment_sum": lambda x, c, labels: ops.segment_sum(x).square().sum(),
}
CONSTANT = {
    "gae": lambda x, c, labels: ops.gae(x, c).advantages.sum(),
    "group_advantages": lambda x, c, labels: ops.group_advantages(x[:, 0], num_generations=2).sum(),
    "whiten": lambda x, c, labels: (ops.whiten(x) * c).sum(),
}


def taken(upstream_is_one: bool):
    x, gradient = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    loss = autograd.one_pass(torch.tensor(3.0), [x], [gradient])
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


def inputs(device="cpu"):
    x, c = torch.randn(2, 4, 7, device=device)
    return x, c, torch.randint(7, (4,), device=device)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_gradient_is_not_differentiated_again(op, device):
    """Neither alone nor where another part of the graph would hide what is missing."""
    x, *rest = inputs(device)
    scale = torch.ones(7, device=device, requires_grad=True)
    for others in (0.0, scale.square().sum()):
        loss = DIFFERENTIABLE[op](x * scale, *rest) + others
        with pytest.raises(RuntimeError, match="create_graph=True; use plain PyTorch"):
            torch.autograd.grad(loss, scale, create_graph=True)
        torch.autograd.grad(loss, scale)


def test_a_sum_lets_others_be_differentiated_twice(device):
    """It is linear: with a constant upstream gradient its own is constant too."""
    x, *_ = inputs(device)
    weights = torch.tensor([1.0, 2.0, 0.0, -1.0], device=device)
    got, want = (
        torch.autograd.functional.hvp(lambda x: (f(x.exp()) * weights).sum(), x, x)[1]  # noqa: B023
        for f in (ops.segment_sum, ops.segment_sum_ref)
    )
    torch.testing.assert_close(got, want)


def jvp_of_dual_tensors(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


FORWARD_MODE = {
    "dual tensors": jvp_of_dual_tensors,
    "jvp": lambda f, x, tangent: torch.func.jvp(f, (x,), (tangent,))[1],
    "jvp in vmap": lambda f, x, tangent: torch.func.vmap(
        lambda t: torch.func.jvp(f, (x,), (t,))[1]
    )(tangent[None])[0],
    "the outer one of two": lambda f, x, tangent: torch.func.jvp(
        lambda y: torch.func.jvp(lambda z: z.sum() + f(y), (x,), (x,))[0], (x,), (tangent,)
    )[1],
}


@pytest.mark.parametrize("mode", FORWARD_MODE)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_is_refused(op, mode):
    x, *rest = inputs()
    function = lambda x: DIFFERENTIABLE[op](x, *rest)  # noqa: E731
    for grad_mode in (torch.enable_grad, torch.no_grad):
        with grad_mode(), pytest.raises(NotImplementedError, match="reverse mode, got a tangent"):
            FORWARD_MODE[mode](function, x, torch.ones_like(x))


@pytest.mark.parametrize("op", CONSTANT)
def test_estimators_are_constants_in_every_mode(op):
    x, *rest = inputs()
    function = lambda x: CONSTANT[op](x, *rest) + x.sum()  # noqa: E731
    assert FORWARD_MODE["jvp"](function, x, torch.ones_like(x)) == x.numel()
    assert FORWARD_MODE["dual tensors"](function, x, torch.ones_like(x)) == x.numel()
    assert torch.equal(torch.func.grad(function)(x), torch.ones_like(x))


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if not op.startswith("linear")])
def test_constants_may_stand_beside_a_tangent(op):
    x, *rest = inputs()
    tangent = torch.ones_like(x)
    got = FORWARD_MODE["jvp"](lambda t: t.sum() + DIFFERENTIABLE[op](x + 1, *rest), x, tangent)
    assert got == x.numel()


@pytest.mark.parametrize("op", DIFFERENTIABLE | CONSTANT)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_other_transforms_are_right_or_refused(op):
    """torch runs some ops row by row under vmap, and asks the others for a rule of their own."""
    xs, c = torch.randn(3, 4, 7), torch.randn(4, 7)
    labels = torch.randint(7, (4,))
    function = lambda x: (DIFFERENTIABLE | CONSTANT)[op](x, c, labels)  # noqa: E731
    try:
        got = torch.func.vmap(function)(xs)
    except RuntimeError as error:
        assert "Batching rule not implemented" in str(error) or "setup_context" in str(error)
    else:
        torch.testing.assert_close(got, torch.stack([function(x) for x in xs]))
    if op in DIFFERENTIABLE:
        with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
            torch.func.grad(function)(xs[0])


def test_no_backward_is_left_unmarked():
    linear = {"segment_sum.py"}  # asks itself
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        functions = text.count("(torch.autograd.Function):") - (path.name in linear)
        marked = text.count("first_order\n    def backward(ctx")
        assert functions == marked, f"{path}: {functions} functions, {marked} marked"
