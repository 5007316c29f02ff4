"""Logits that wait: the same answers as the logits themselves, and nothing computed twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rlhf_fast.integrations import deferred
from rlhf_fast.integrations.deferred import DeferredLogits
from rlhf_fast.integrations.from_logits import LiveLogits, from_logits
from tests.integrations.standins import assert_near

BATCH, LENGTH, WIDTH, VOCAB = 4, 6, 8, 23


@pytest.fixture
def rows_computed(monkeypatch):
    """The number of rows that each call of the fused head computed."""
    counts, original = [], deferred.linear_logps

    def counted(hidden, weight, labels, *, ignore_index=-100, **settings):
        counts.append(int((labels != ignore_index).sum()))
        return original(hidden, weight, labels, ignore_index=ignore_index, **settings)

    monkeypatch.setattr(deferred, "linear_logps", counted)
    return counts


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    tensors = (draw(BATCH, LENGTH, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB))
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    return tensors, labels


def compare(function, tensors):
    """`function` of waiting logits and of logits: same results, same gradients."""
    results = []
    for make_logits in (DeferredLogits, F.linear):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(make_logits(*leaves))
        sum((x * (i + 1)).sum() for i, x in enumerate(out)).backward()
        results.append([*out, *(x.grad for x in leaves)])
    for i, (got, expected) in enumerate(zip(*results)):
        assert_near(f"result {i}", got.detach(), expected.detach())


def labelled(logits, labels):
    return from_logits(LiveLogits.labelled(logits, labels, -100), next_of(labels)).logps


def next_of(labels):
    return F.pad(labels[:, 1:], (0, 1)).clamp(min=0)


def nll(logits, labels):
    logits = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(logits.view(-1, logits.shape[-1]), labels[..., 1:].reshape(-1))


def test_losses_of_the_same_labels_are_computed_once(rows_computed):
    tensors, ids = make()
    responses = ids.masked_fill(torch.arange(LENGTH) < 3, -100)
    ids = ids.clone()
    ids[1, 4:] = responses[1, 4:] = -100  # a shorter one

    def orpo(logits):
        return nll(logits[:2], ids[:2]), labelled(logits, responses)

    compare(orpo, tensors)
    chosen, all_responses = (int((x[:, 1:] != -100).sum()) for x in (ids[:2], responses))
    assert rows_computed == [chosen, all_responses - int((responses[:2, 1:] != -100).sum())]


def test_other_labels_of_a_row_are_computed(rows_computed):
    tensors, ids = make()
    other = (ids + 1) % VOCAB
    compare(lambda x: (nll(x, ids), nll(x, other), nll(x, ids)), tensors)
    everything = BATCH * (LENGTH - 1)
    assert rows_computed == [everything, everything, 0]


def test_rows_that_appear_twice_keep_their_own_labels():
    tensors, ids = make()
    twice = torch.tensor([0, 1, 0])
    other = (ids[twice] + torch.tensor([0, 0, 3])[:, None]) % VOCAB
    compare(lambda x: (nll(x[twice], other), nll(x, ids)), tensors)


def test_scales_and_gradient_modes_are_kept_apart(rows_computed):
    tensors, ids = make()

    def both(logits):
        with torch.no_grad():
            without = nll(logits, ids)
        return nll(logits, ids), nll(logits / 0.5, ids), without

    compare(both, tensors)
    assert len(rows_computed) == 3 and 0 not in rows_computed
    detached = DeferredLogits(*(x.requires_grad_() for x in tensors)).detach()
    assert not nll(detached, ids).requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"weight": torch.rand(VOCAB)},
        {"ignore_index": 3},
    ],
    ids=lambda options: next(iter(options)) + str(options.get("reduction", "")),
)
def test_cross_entropy_with_every_option(options):
    tensors, ids = make()
    compare(lambda x: [F.cross_entropy(x.view(-1, VOCAB), ids.view(-1), **options)], tensors)


def test_cross_entropy_of_probabilities_and_of_nothing():
    tensors, ids = make()
    compare(
        lambda x: [F.cross_entropy(x.view(-1, VOCAB), torch.full((24, VOCAB), 1 / VOCAB))], tensors
    )
    assert nll(DeferredLogits(*tensors), torch.full_like(ids, -100)).isnan()


def test_other_shapes_are_those_of_the_logits():
    tensors, _ = make()
    waiting, logits = DeferredLogits(*tensors), F.linear(*tensors)
    torch.testing.assert_close(waiting.view(2, -1), logits.view(2, -1))
    flat = DeferredLogits(*tensors)[:, 1:].contiguous().view(-1, VOCAB)
    torch.testing.assert_close(flat.compute(), logits[:, 1:].reshape(-1, VOCAB))


def test_masked_rows_do_not_hide_their_entropy():
    """Asked for after the log-probs of some rows, the entropy is that of all rows."""
    tensors, ids = make()
    mask = torch.arange(LENGTH) < 4
    compare(
        lambda x: (
            from_logits(x, ids, row_mask=mask.expand(BATCH, -1)).logps,
            from_logits(x, outputs=("entropy",)).entropy,
        ),
        tensors,
    )
