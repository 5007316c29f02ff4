"""Calls left to the framework's own code: told once, with the reason."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

from rlhf_fast.integrations import declining
from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.deferred import DeferredLogits
from rlhf_fast.integrations.deferred_heads import deferred_heads
from rlhf_fast.integrations.from_logits import misfit
from tests.tiny import tiny_model


@pytest.fixture
def told(monkeypatch, caplog):
    monkeypatch.setattr(declining, "told", set())
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_reason_is_told_once(told):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as LLaMA-Factory's trainers do
        for _ in range(3):
            assert declined(misfit, "it is Tuesday") is misfit
    declined(misfit, "it rains")
    name = "rlhf_fast.integrations.from_logits.misfit"
    reasons = ("it is Tuesday", "it rains")
    assert told() == [f"rlhf_fast: {name} runs its own code: {why}" for why in reasons]


def test_a_bound_apply_is_told_by_its_class(told):
    class Head(torch.autograd.Function):
        pass

    declined(Head.apply, "why")
    assert "Head runs its own code: why" in told()[0]


def test_nothing_is_told_while_a_compiler_looks(told):
    compiled = torch.compile(
        lambda x: declined(torch.sin, "why")(x), backend="eager", fullgraph=True
    )
    compiled(torch.ones(2))
    assert told() == []


LOGITS, LABELS = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)


def waiting(dtype=torch.float32, scale=1.0):
    return DeferredLogits(LOGITS.to(dtype), torch.randn(7, 5, dtype=dtype), None, scale)


@pytest.mark.parametrize(
    "logits, labels, reason",
    [
        (LOGITS, LABELS, None),
        (LOGITS, LABELS[..., None], None),
        (LOGITS.double(), LABELS, "float32, bfloat16 or float16, got torch.float64"),
        (nn.Parameter(LOGITS), LABELS, "plain tensor, got Parameter"),
        (LOGITS[0, 0], None, "rows and a vocabulary"),
        (LOGITS.mT, None, "contiguous along the vocabulary"),
        (LOGITS, LABELS[:, :2], "a row must have 1 to"),
        (waiting, LABELS, None),
        (waiting, LABELS[..., None], "one label"),
        (lambda: waiting(scale=-1.0), LABELS, "temperature must be positive"),
        (lambda: waiting(torch.float64), LABELS, "hidden states must"),
    ],
)
def test_why_the_kernel_does_not_take_logits(logits, labels, reason):
    found = misfit(logits() if callable(logits) else logits, labels)
    assert found is None if reason is None else reason in found


class Quantised(nn.Linear):
    pass


def quantised(model):
    model.set_output_embeddings(Quantised(4, 4))


def offloaded(model):
    head = model.get_output_embeddings()
    head.forward = head.forward


def sharded(model):
    model.get_output_embeddings().weight.ds_id = 1


@pytest.mark.parametrize(
    "change, reason",
    [
        (quantised, "plain torch.nn.Linear, got Quantised"),
        (offloaded, "a forward of its own"),
        (sharded, "sharded or offloaded"),
        (nn.DataParallel, "look into its output"),
        (lambda model: torch.compile(model), "compiled"),
        (lambda model: model.model, "got NoneType"),
    ],
    ids=["quantised", "offloaded", "sharded", "wrapped", "compiled", "backbone"],
)
def test_a_head_that_cannot_wait_is_told(change, reason, told):
    model = tiny_model()
    changed = change(model)
    model = model if changed is None else changed
    for _ in range(2):
        with deferred_heads(model, None):
            pass
    assert len(told()) == 1 and reason in told()[0] and "computes all its logits" in told()[0]


def test_a_head_that_waits_is_not_told_of(told):
    model = tiny_model()
    with deferred_heads(model), deferred_heads(model, model):
        assert isinstance(model(torch.ones(1, 2, dtype=torch.long)).logits, DeferredLogits)
    assert told() == [] and "forward" not in vars(model.get_output_embeddings())
