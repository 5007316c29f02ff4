"""The stand-in for Liger's JSD loss, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast.losses.liger_distillation import FusedLinearJSDLoss
from rlhf_fast.ops import kl_ref
from tests.ops.conftest import assert_as_accurate

ROWS, VOCAB = 300, 97
"""More rows than a chunk holds."""


def problem(words_missing=0):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.randint(VOCAB - words_missing, (ROWS,), generator=generator)
    labels[::3] = -100
    student = [draw(ROWS, 16), draw(VOCAB - words_missing, 16), draw(VOCAB - words_missing)]
    teacher = [draw(ROWS, 24), draw(VOCAB, 24) * 0.5, draw(VOCAB)]
    return student, teacher, labels


def plain(student, teacher, labels, beta=0.5, temperature=1.0):
    """(soft, hard) with every logit in memory."""
    logits, target = (F.linear(*x) for x in (student, teacher))
    hard = F.cross_entropy(logits, labels)
    padded = F.pad(logits, (0, target.shape[1] - logits.shape[1]))
    kind = {0: "forward", 1: "reverse"}.get(beta, "jsd")
    more = {"beta": beta} if kind == "jsd" else {}
    rows = kl_ref(padded, target, kind=kind, temperature=temperature, **more)
    return rows[labels != -100].mean(), hard


def results(call, student, teacher, labels, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in student]
    loss, soft, hard = call(leaves, [t.to(dtype) for t in teacher], labels)
    (0.7 * loss).backward()
    return loss, soft, hard, *(t.grad for t in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta, temperature", [(0, 1.0), (0.3, 2.0), (1, 0.7)])
@pytest.mark.parametrize("words_missing", [0, 5])
def test_values_and_gradients(beta, temperature, words_missing, dtype):
    given = problem(words_missing)

    def reference(student, teacher, labels):
        soft, hard = plain(student, teacher, labels, beta, temperature)
        return 0.8 * soft + 0.2 * hard, soft, hard

    def ours(student, teacher, labels):
        loss = FusedLinearJSDLoss(0.2, 0.8, beta, -100, temperature, return_soft_hard_loss=True)
        (h, w, b), (th, tw, tb) = student, teacher
        return loss(h, w, th, tw, labels, b, tb)

    truth = results(reference, *given, torch.float64)
    torchs = results(reference, *given, dtype)
    got = results(ours, *given, dtype)
    names = ("loss", "soft", "hard", "d hidden", "d weight", "d bias")
    for name, *triple in zip(names, got, torchs, truth):
        if dtype == torch.bfloat16 and triple[0].dim() == 0:  # one number can be right by chance
            torch.testing.assert_close(triple[0].double(), triple[2], rtol=2**-8, atol=0.0)
            continue
        assert_as_accurate(name, *triple, factor=3.0)


def test_no_live_label_gives_zero_and_a_gradient():
    (h, w, b), (th, tw, tb), labels = problem()
    w.requires_grad_()
    loss = FusedLinearJSDLoss()(h, w, th, tw, torch.full_like(labels, -100), b, tb)
    loss.backward()
    assert loss == 0 and torch.equal(w.grad, torch.zeros_like(w))


def test_bad_input_is_refused():
    (h, w, b), (th, tw, tb), labels = problem()
    for options in ({"beta": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="FusedLinearJSDLoss: .* must be"):
            FusedLinearJSDLoss(**options)
    with pytest.raises(ValueError, match="must have at least"):
        FusedLinearJSDLoss()(h, w, th, tw[:50], labels, b, tb[:50])
    with pytest.raises(ValueError, match="labels"):
        FusedLinearJSDLoss()(h, w, th, tw, torch.full_like(labels, VOCAB), b, tb)
    with pytest.raises(ValueError, match="teacher_input must have the rows"):
        FusedLinearJSDLoss()(h, w, th[1:], tw, labels, b, tb)
