"""logps: gradients in the same pass, over the logits, of views, of nothing."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import logps, logps_ref, logps_with_grad_
from tests.ops.conftest import assert_as_accurate
from tests.ops.logps_cases import (
    DTYPES,
    SETTINGS,
    gradient,
    make,
    upstream_for,
)


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 7, 33, 1003, 49152, 128256])
def test_gradient_in_the_same_pass(device, vocab, dtype, settings):
    """The longer rows are kept by clusters of 1 to 8 blocks."""
    num_rows = 2 if vocab > 1003 else 11
    base, labels = make(num_rows, vocab + 3, dtype, device)
    labels = labels % vocab
    labels[1] = -100
    for logits in (base[:, :vocab].contiguous(), base[:, 1 : vocab + 1]):
        for with_entropy in (False, True):
            upstream = {"logps": torch.randn(num_rows)}
            if with_entropy:
                upstream["entropy"] = torch.randn(num_rows)
            outputs = (*upstream, "lse") if with_entropy else ("logps",)
            want, plain = (
                gradient(logps_ref, x, labels, upstream, outputs=outputs, **settings)
                for x in (logits.double(), logits)
            )
            overwritten = base.clone()[:, :vocab] if logits.is_contiguous() else base.clone()
            rows = overwritten if logits.is_contiguous() else overwritten[:, 1 : vocab + 1]
            rows.copy_(logits)
            got = logps_with_grad_(
                rows,
                labels,
                upstream["logps"].to(device),
                grad_entropy=upstream["entropy"].to(device) if with_entropy else None,
                outputs=outputs,
                **settings,
            )
            truth = logps_ref(logits.double(), labels, outputs=outputs, **settings)
            torch_own = logps_ref(logits, labels, outputs=outputs, **settings)
            for name in outputs:
                triple = (getattr(o, name) for o in (got, torch_own, truth))
                assert_as_accurate(name, *triple)
            assert_as_accurate("gradient", rows, plain, want, factor=3.0)
            if not logits.is_contiguous():  # the neighbours of each row
                assert torch.equal(overwritten[:, 0], base[:, 0])
                assert torch.equal(overwritten[:, vocab + 1 :], base[:, vocab + 1 :])


def test_gradient_in_the_same_pass_with_repeated_labels(device):
    logits, _ = make(5, 300, torch.float32, device)
    labels = torch.tensor([[7, 7, -100, 299], [0, 1, 2, 3], [5, 5, 5, 5]], device=device)[
        [0, 1, 2, 1, 0]
    ]
    upstream = {"logps": torch.randn(5, 4)}
    want = gradient(logps_ref, logits.double(), labels, upstream)
    rows = logits.clone()
    got = logps_with_grad_(rows, labels, upstream["logps"].to(device))
    torch.testing.assert_close(got.logps, logps(logits, labels).logps)
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"top_k": 5}], ids=["plain", "scaled", "softcap", "top-k"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_upstream_gradient_get_zeros_whatever_they_hold(
    device, value, dtype, settings
):
    base, labels = make(6, 1007, dtype, device)
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 0.0], device=device)
    masked = upstream == 0.0
    damaged = base.masked_fill(masked[:, None], value)
    for outputs in (("logps",), ("logps", "entropy", "lse")):
        for inplace in (False, True):
            got, want = (
                through(x, labels, upstream, outputs, inplace_backward=inplace, **settings)
                for x in (damaged, base)
            )
            assert (got[masked] == 0.0).all()
            assert torch.equal(got, want)
    if "top_k" not in settings:
        for grad_entropy in (None, upstream):
            rows = damaged.clone()
            logps_with_grad_(rows, labels, upstream, grad_entropy=grad_entropy, **settings)
            assert (rows[masked] == 0.0).all() and (rows[~masked] != 0.0).any()


def through(logits, labels, upstream, outputs, **settings):
    logits = logits.clone().requires_grad_()
    out = logps(logits * 1, labels, outputs=outputs, **settings)
    found = [getattr(out, name) for name in outputs]
    return torch.autograd.grad(found, logits, [upstream] * len(found))[0]


def test_gradient_of_a_shifted_view_reaches_the_base(device):
    base = make(10, 40, torch.float32, device)[0].reshape(2, 5, 40).requires_grad_()
    labels = torch.randint(40, (2, 4), device=device)
    got, want = (
        torch.autograd.grad(f(base[:, :-1], labels).logps.sum(), base)[0]
        for f in (logps, logps_ref)
    )
    assert (got[:, -1] == 0).all()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_inplace_backward_writes_the_same_gradient_over_the_logits(device, dtype):
    logits, labels = make(7, 1003, dtype, device)
    want = gradient(logps, logits, labels, outputs=("logps", "entropy"))
    hidden = logits.clone().requires_grad_()
    activation = hidden * 1.0
    out = logps(activation, labels, outputs=("logps", "entropy"), inplace_backward=True)
    upstream = upstream_for(out)
    loss = sum((getattr(out, n) * g.to(device)).sum() for n, g in upstream.items())
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, want)
    assert torch.equal(activation, want), "the gradient lies where the logits were"
    with pytest.raises(RuntimeError, match="backward must run once"):
        loss.backward()


def test_inplace_backward_is_noticed_by_others_who_saved_the_logits(device):
    logits, labels = make(3, 50, torch.float32, device)
    activation = logits.requires_grad_() * 1.0
    square = (activation * activation).sum()  # saves the activation
    loss = logps(activation, labels, inplace_backward=True).logps.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_empty_and_fully_ignored_batches_stay_connected(device):
    for logits in (torch.randn(0, 7, device=device), torch.randn(4, 7, device=device)):
        labels = torch.full((len(logits),), -100, device=device)
        logits.requires_grad_()
        out = logps(logits, labels, outputs=("logps", "lse"))
        assert out.logps.shape == (len(logits),) and out.logps.sum() == 0
        out.logps.sum().backward()
        assert logits.grad.shape == logits.shape and (logits.grad == 0).all()
