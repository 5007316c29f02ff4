"""Fused heads called by compiled code: a graph break, no recompilation, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf_fast.ops import linear_logps, linear_policy_loss, linear_preference_loss
from tests.ops.heads import make


def logps(hidden, weight, labels):
    return linear_logps(hidden, weight, labels).logps.sum()


def policy(hidden, weight, labels):
    batch = hidden.view(10, 30, -1), weight, labels.view(10, 30)
    return linear_policy_loss(*batch, None, torch.linspace(-1, 1, 10), normalizer=9.0).loss


def preference(hidden, weight, labels):
    refs = torch.linspace(-2, 2, 5), torch.linspace(1, -1, 5)
    starts = torch.arange(0, 301, 30)
    return linear_preference_loss(hidden, weight, labels, starts, *refs, num_pairs=5).loss


LOSSES = pytest.mark.parametrize("loss", [logps, policy, preference])


def surrounded(loss):
    return lambda hidden, *args: loss(torch.tanh(hidden), *args) * 3


@LOSSES
def test_values_and_gradients_are_those_of_an_eager_caller(loss):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, problem, frames = torch.compile(surrounded(loss), backend=counter), make(), []
    for num_ignored in (0, 7, 150):
        problem.labels[:num_ignored] = -100
        results = []
        for function in (surrounded(loss), compiled):
            leaves = problem.leaves()
            value = function(leaves.hidden, leaves.weight, leaves.labels)
            value.backward()
            results.append({"loss": value.detach(), **leaves.gradients()})
        for name, want in results[0].items():
            torch.testing.assert_close(results[1][name], want)
        frames.append(counter.frame_count)
    assert 0 < frames[0] == frames[-1], "compiled again for another number of live rows"


@LOSSES
def test_one_graph_is_refused_by_name(loss):
    torch._dynamo.reset()
    problem = make()
    compiled = torch.compile(surrounded(loss), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="linear_"):
        compiled(problem.hidden, problem.weight, problem.labels)
