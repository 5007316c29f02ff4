"""LLaMA-Factory's own functions and trainers, patched and not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from llamafactory.train import trainer_utils
from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.kto import trainer as kto

from rlhf_fast.integrations import deferred, llamafactory
from tests.integrations.standins import assert_near
from tests.tiny import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.peers


def batch(num_pairs=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, VOCAB_SIZE, (2 * num_pairs, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 6:] = -100
    return ids, labels


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    original = deferred.linear_logps
    monkeypatch.setattr(
        deferred, "linear_logps", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    return calls


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_batch_logps(ld_alpha):
    _, labels = batch()
    labels[2] = -100  # an example without any response
    logits = torch.randn(*labels.shape, VOCAB_SIZE) * 5
    results = []
    original = trainer_utils.get_batch_logps
    for patched in (False, True):
        x = logits.clone().requires_grad_()
        handle = llamafactory.patch() if patched else None
        assert (dpo.get_batch_logps is original) is not patched
        logps, lengths = dpo.get_batch_logps(x, labels, ld_alpha=ld_alpha)
        logps.square().sum().backward()
        results.append((logps, lengths, x.grad))
        if handle:
            handle.undo()
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)
    assert kto.get_batch_logps is dpo.get_batch_logps is original


def test_shapes_that_do_not_match_are_refused_as_before():
    _, labels = batch()
    with llamafactory.patch(), pytest.raises(ValueError, match="same shape"):
        dpo.get_batch_logps(torch.randn(6, 8, VOCAB_SIZE), labels)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo"])
def test_dpo_forward(loss_type, fused_calls):
    ids, labels = batch()
    trainer = SimpleNamespace(
        finetuning_args=SimpleNamespace(use_ref_model=True), ld_alpha=None, loss_type=loss_type
    )
    compare(
        lambda model: dpo.CustomDPOTrainer.concatenated_forward(
            trainer, model, {"input_ids": ids, "labels": labels}
        ),
        ("chosen_logits", "rejected_logits"),
        lambda out: (out["chosen_logps"] - out["rejected_logps"]).square().sum(),
    )
    assert fused_calls


def test_kto_forward(fused_calls):
    ids, labels = batch()
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    compare(
        lambda model: dict(
            zip(
                ("logits", "logps", "logps_avg"),
                kto.CustomKTOTrainer.forward(None, model, dict(data)),
            )
        ),
        ("logits",),
        lambda out: out["logps"].square().sum(),
    )
    assert fused_calls


def compare(forward, logits, loss_of):
    """Same log-probs, same means of logits (all that LLaMA-Factory logs of them), same gradient."""
    results = []
    for patched in (False, True):
        model = tiny_model()
        handle = llamafactory.patch() if patched else None
        out = forward(model)
        loss_of(out).backward()
        found = {k: v.mean() if k in logits else v for k, v in out.items()}
        found |= {f"sum {k}": out[k].nansum() for k in logits}
        found |= {name: p.grad for name, p in model.named_parameters()}
        results.append(found)
        if handle:
            assert all(isinstance(out[k], deferred.DeferredLogits) for k in logits)
            handle.undo()
    for name, expected in results[0].items():
        assert_near(name, results[1][name], expected)
