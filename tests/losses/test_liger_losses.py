"""Liger's classes, called from its package, against ours."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.losses import liger as ours

pytestmark = pytest.mark.peers
theirs = pytest.importorskip("liger_kernel.chunked_loss")

ROWS, LENGTH, WIDTH, VOCAB = 6, 7, 16, 97


def inputs(dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    target = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    target[:, :2] = -100
    target[1, 4:] = -100
    policy = [draw(ROWS, LENGTH, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB) if bias else None]
    reference = [draw(ROWS, LENGTH, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB) if bias else None]
    return policy, reference, target


def run(loss, arguments, policy):
    leaves = [None if t is None else t.clone().requires_grad_() for t in policy]
    value, metrics = loss(*arguments(*leaves))
    (value * 0.7).backward()
    return [value, *metrics, *(t.grad for t in leaves if t is not None)]


def compare(name, options, arguments, policy):
    results = [
        run(getattr(module, prefix + name)(compiled=False, **options), arguments, policy)
        for module, prefix in ((ours, ""), (theirs, "Liger"))
    ]
    assert len(results[0]) == len(results[1])
    for i, (got, expected) in enumerate(zip(*results)):
        assert got.dtype == expected.dtype or i > 0
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.mark.parametrize("loss_type", ours.FusedLinearDPOLoss.LOSS_TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_dpo(loss_type, bias):
    policy, reference, target = inputs(bias=bias)
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    compare(
        "FusedLinearDPOLoss",
        {"loss_type": loss_type, "beta": 0.05, **smoothing},
        lambda h, w, b: (w, h, target, b, *reference),
        policy,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"compute_nll_loss": True, "alpha": 0.3},
        {"average_log_prob": True, "label_smoothing": 0.2},  # which sigmoid ignores
        {"use_ref_model": False},
    ],
)
def test_dpo_options(options):
    policy, reference, target = inputs()
    reference = reference if options.get("use_ref_model", True) else []
    compare("FusedLinearDPOLoss", options, lambda h, w, b: (w, h, target, b, *reference), policy)


def test_dpo_refuses_what_liger_refuses():
    with pytest.raises(ValueError, match="loss_type must be one of"):
        ours.FusedLinearDPOLoss(loss_type="ipo")


@pytest.mark.parametrize("with_nll_target", [False, True])
@pytest.mark.parametrize("compute_nll_loss", [False, True])
def test_orpo(with_nll_target, compute_nll_loss):
    policy, _, target = inputs()
    nll_target = torch.randint(VOCAB, target.shape) if with_nll_target else None
    compare(
        "FusedLinearORPOLoss",
        {"beta": 0.2, "compute_nll_loss": compute_nll_loss},
        lambda h, w, b: (w, h, target, b, nll_target),
        policy,
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("CPO", {}),
        ("CPO", {"label_smoothing": 0.1, "alpha": 0.5, "beta": 0.3}),
        ("CPO", {"average_log_prob": True, "compute_nll_loss": False}),
        ("SimPO", {}),
        ("SimPO", {"gamma": 1.3, "beta": 2.0, "label_smoothing": 0.1, "compute_nll_loss": False}),
    ],
)
def test_cpo_and_simpo(name, options):
    policy, _, target = inputs()
    arguments = lambda h, w, b: (w, h, target, b)  # noqa: E731
    compare(f"FusedLinear{name}Loss", options, arguments, policy)


@pytest.mark.parametrize("kl", [None, "one", "each"])
@pytest.mark.parametrize("average", [False, True])
def test_kto(kl, average):
    policy, reference, target = inputs()
    labels = torch.tensor([True, False, True, True, False, False])
    kl = {None: None, "one": torch.tensor(0.7), "each": torch.rand(ROWS)}[kl]
    compare(
        "FusedLinearKTOLoss",
        # Liger pairs each chunk with all of kl, so only one chunk tells sequences apart.
        {"use_ref_model": True, "average_log_prob": average, "beta": 0.05, "chunk_size": ROWS},
        lambda h, w, b: (h, w, target, b, labels, *reference, kl),
        policy,
    )
