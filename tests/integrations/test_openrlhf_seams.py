"""OpenRLHF's own functions and actor, patched and not."""

from __future__ import annotations

import pytest
import torch
from openrlhf.models import Actor, actor, utils

from rlhf_fast.integrations import deferred, openrlhf
from tests.integrations.standins import assert_near
from tests.ops.conftest import assert_as_accurate
from tests.tiny import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.peers


def log_probs(logits, labels, temperature):
    """(log-probs, logits afterwards, gradient) of whatever OpenRLHF's actor calls now."""
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    logps = actor.log_probs_from_logits(given, labels, temperature)
    logps.double().square().sum().backward()
    return logps, given.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(dtype, temperature):
    logits = (torch.randn(3, 7, 301) * 6).to(dtype)
    labels = torch.randint(301, (3, 7))
    plain = log_probs(logits, labels, temperature)
    truth = log_probs(logits.double(), labels, temperature)
    with openrlhf.patch():
        ours = log_probs(logits, labels, temperature)
        float64 = log_probs(logits.double(), labels, temperature)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    for name, *triple in zip(("log-probs", "logits afterwards", "gradient"), ours, plain, truth):
        assert_as_accurate(name, *triple, factor=3.0 if name == "gradient" else 2.0)
    for got, expected in zip(float64, truth):  # which the kernel does not take
        assert torch.equal(got, expected)


def test_compute_entropy():
    logits = torch.randn(2, 5, 301) * 6
    expected = torch.distributions.Categorical(logits=logits).entropy()
    original = utils.compute_entropy
    with openrlhf.patch():
        assert actor.compute_entropy is utils.compute_entropy is not original
        torch.testing.assert_close(actor.compute_entropy(logits), expected)
    assert actor.compute_entropy is utils.compute_entropy is original


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_actor_forward(temperature, with_entropy, monkeypatch):
    calls = []
    fused = deferred.linear_logps
    monkeypatch.setattr(deferred, "linear_logps", lambda *a, **k: calls.append(1) or fused(*a, **k))
    ids = torch.randint(20, VOCAB_SIZE, (3, 9))
    action_mask = torch.ones(3, 4, dtype=torch.bool)
    action_mask[1, 2:] = False
    results = []
    for patched in (False, True):
        model = Actor(tiny_model(), temperature=temperature)
        model.packing_samples = False
        handle = openrlhf.patch() if patched else None
        asked = {"return_output": True, "return_entropy": with_entropy}
        with torch.compiler.set_stance("force_eager"):  # compiling compute_entropy takes long
            logps, output = model(ids, action_mask, torch.ones_like(ids), **asked)
        loss = logps.square().sum() + (output.entropy.sum() if with_entropy else 0.0)
        loss.backward()
        results.append(dict(model.named_parameters()) | {"logps": logps})
        if handle:
            assert len(calls) == 1 + with_entropy
            handle.undo()
    for name, expected in results[0].items():
        got = results[1][name]
        assert_near(name, *((t if name == "logps" else t.grad) for t in (got, expected)))


def test_logits_that_were_asked_for_are_there():
    model = Actor(tiny_model())
    model.packing_samples = False
    ids = torch.randint(20, VOCAB_SIZE, (2, 5))
    with openrlhf.patch():
        output = model(ids, attention_mask=torch.ones_like(ids), return_output=True)
    assert isinstance(output["logits"], torch.Tensor)
