"""Fused heads in compiled code: one graph, no recompilation, and the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf_fast.ops import (
    PairData,
    PolicyLossParams,
    PreferenceParams,
    linear_logps,
    linear_policy_loss,
    linear_preference_loss,
)
from rlhf_fast.ops.head_inputs import HeadSettings
from tests.ops.heads import make


def logps(hidden, weight, labels):
    return linear_logps(hidden, weight, labels).logps.sum()


def logps_with_everything(hidden, weight, labels):
    found = linear_logps(
        hidden.view(10, 30, -1),
        weight,
        labels.view(10, 30),
        bias=torch.linspace(-1, 1, len(weight)),
        mask=torch.arange(300).view(10, 30) % 3 > 0,
        temperature=torch.linspace(0.5, 2, 300).view(10, 30),
        softcap=20.0,
        outputs=("logps", "entropy", "is_top1", "lse"),
        logits_budget_bytes=100_000,
    )
    return (found.logps * 2 + found.entropy + found.lse * found.is_top1).sum()


def policy(hidden, weight, labels):
    batch = hidden.view(10, 30, -1), weight, labels.view(10, 30)
    return linear_policy_loss(*batch, None, torch.linspace(-1, 1, 10), normalizer=9.0).loss


def preference(hidden, weight, labels):
    refs = torch.linspace(-2, 2, 5), torch.linspace(1, -1, 5)
    starts = torch.arange(0, 301, 30)
    return linear_preference_loss(hidden, weight, labels, starts, *refs, num_pairs=5).loss


def policy_with_everything(hidden, weight, labels):
    batch = hidden.view(10, 30, -1), weight, labels.view(10, 30)
    per_token = torch.linspace(-3, -5, 300).view(10, 30)
    found = linear_policy_loss(
        *batch,
        per_token,
        torch.linspace(-1, 1, 10),
        bias=torch.linspace(-1, 1, len(weight)),
        mask=torch.arange(300).view(10, 30) % 3 > 0,
        settings=HeadSettings(torch.linspace(0.5, 2, 300).view(10, 30), 20.0, 0.9),
        loss_type="dr_grpo",
        params=PolicyLossParams(max_length=40, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.01),
        ref_logps=per_token + 0.1,
        sampling_logps=per_token - 0.1,
        normalizer=torch.tensor(7.0),
        logits_budget_bytes=100_000,
    )
    assert not found.logps.requires_grad
    return found.loss + found.logps.sum() + found.entropy.mean() + found.metrics[0]


def preference_with_everything(hidden, weight, labels):
    found = linear_preference_loss(
        hidden,
        weight,
        labels,
        torch.arange(0, 301, 30),
        mask=torch.arange(300) % 3 > 0,
        settings=HeadSettings(1.3, ignore_index=-100),
        loss_type="simpo",
        beta=2.0,
        params=PreferenceParams(margin=0.3, label_smoothing=0.1),
        data=PairData(weights=torch.linspace(0, 1, 5)),
    )
    return found.loss + found.chosen_logps.sum() + found.pairs.means.sum()


ONE_PASS = [policy, preference, policy_with_everything, preference_with_everything]
LOSSES = [logps, logps_with_everything, *ONE_PASS]


def surrounded(loss):
    return lambda hidden, *args: loss(torch.tanh(hidden), *args) * 3


def run(function, problem):
    leaves = problem.leaves()
    value = function(leaves.hidden, leaves.weight, leaves.labels)
    value.backward()
    return {"loss": value.detach(), **leaves.gradients()}


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_those_of_an_eager_caller(loss):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(surrounded(loss), backend=counter, fullgraph=True)
    problem, frames = make(), []
    for num_ignored in (0, 7, 150):
        problem.labels[:num_ignored] = -100
        got, wanted = run(compiled, problem), run(surrounded(loss), problem)
        for name, want in wanted.items():
            torch.testing.assert_close(got[name], want)
        frames.append(counter.frame_count)
    assert 0 < frames[0] == frames[-1], "compiled again for another number of live rows"


@pytest.mark.parametrize("loss", [logps, policy, preference])
def test_two_calls_before_one_backward(loss):
    """As of a compiled model that sees chosen and rejected responses one after the other."""
    torch._dynamo.reset()
    function, problems = surrounded(loss), (make(), make())
    problems[1].hidden.mul_(0.5)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for f in (function, compiled):
        leaves = [p.leaves() for p in problems]
        sum(f(x.hidden, x.weight, x.labels) for x in leaves).backward()
        results.append([x.hidden.grad for x in leaves])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [logps, policy, preference])
def test_frozen_heads_autocast_and_no_gradient(loss):
    torch._dynamo.reset()
    problem, function = make(), surrounded(loss)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for f in (function, compiled):
        hidden = problem.hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = f(hidden, problem.weight, problem.labels)
        value.backward()
        with torch.no_grad():
            again = f(hidden, problem.weight, problem.labels)
        results.append((value.detach(), hidden.grad, again))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("loss", [logps, policy, preference])
def test_a_sharded_weight_is_gathered_inside_the_graph(loss, mesh):
    torch._dynamo.reset()
    problem = make()
    wanted = run(surrounded(loss), problem)
    leaves = problem.leaves()
    weight = distribute_tensor(leaves.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    compiled = torch.compile(surrounded(loss), backend="aot_eager", fullgraph=True)
    compiled(leaves.hidden, weight, leaves.labels).backward()
    torch.testing.assert_close(leaves.hidden.grad, wanted["hidden"])
    assert weight.grad.placements == (Shard(0),)
    torch.testing.assert_close(weight.grad.full_tensor(), wanted["weight"])


def test_another_setting_is_seen():
    torch._dynamo.reset()
    problem = make()

    def function(hidden, weight, labels, params):
        batch = hidden.view(10, 30, -1), weight, labels.view(10, 30)
        old = torch.full((10, 30), -5.0)
        return linear_policy_loss(*batch, old, torch.ones(10), params=params).loss

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    args = problem.hidden, problem.weight, problem.labels
    for epsilon in (0.1, 0.5, 3.0):
        params = PolicyLossParams(epsilon_high=epsilon)
        torch.testing.assert_close(compiled(*args, params), function(*args, params))


@pytest.mark.parametrize("loss", ONE_PASS)
def test_opcheck(loss, monkeypatch):
    calls, op = [], torch.ops.rlhf_fast.loss_node

    class Stop(Exception):
        pass

    def record(*args):
        calls.append(args)
        raise Stop

    leaves = make().leaves()
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        patched.setattr(torch.ops.rlhf_fast, "loss_node", record)
        loss(leaves.hidden, leaves.weight, leaves.labels)
    torch.library.opcheck(op, calls[0])


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False,) * 3])
@pytest.mark.parametrize("budget", [0.0, 100_000.0])
def test_opcheck_of_log_probs(needs, budget):
    problem = make()
    bias = torch.linspace(-1, 1, len(problem.weight))
    problem.labels[5:9] = -100
    tensors = problem.hidden, problem.weight, bias, problem.labels, None, None
    numbers = [*HeadSettings(1.3).numbers(), budget]
    names = ["logps", "is_top1", "reference", "log_sum", "entropy"]
    forward, backward = (
        getattr(torch.ops.rlhf_fast, f"linear_logps_node{part}") for part in ("", "_backward")
    )
    torch.library.opcheck(forward, (*tensors, needs, numbers, names))
    _, _, *saved = forward(*tensors, needs, numbers, names)
    upstream = torch.linspace(-1, 1, len(problem.labels))
    for grads in ((upstream, None, None), (upstream, upstream, upstream)):
        torch.library.opcheck(backward, (*tensors, *saved, *grads, needs, numbers))
