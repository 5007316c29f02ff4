"""Rows kept on the chip, on every GPU: blocks may have more or less, clusters exist or do not."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import kl, kl_ref, kl_with_grad_, logps_ref, logps_with_grad_, native

pytest.importorskip("rlhf_fast._emulated", reason="built without RLHF_FAST_EMULATE=ON")

# Compute capability; 90:80 runs code that was compiled for 8.0.
GPUS = ("80", "86", "90", "90:80", "100", "120")
# Rows that would fit into a block of some GPU but for what the kernel itself declares; that take a
# cluster; and that take one on the largest GPUs alone.
WIDTHS = (25_200, 41_600, 58_000, 120_000)


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_EMULATION_GPU", request.param)
    with native.emulated_cuda():
        yield request.param


@pytest.mark.parametrize("width", WIDTHS)
def test_logps(gpu, width):
    logits, labels, upstream = torch.randn(2, width), torch.tensor([5, width - 1]), torch.ones(2)
    x = logits.double().requires_grad_()
    want = logps_ref(x, labels).logps
    (grad,) = torch.autograd.grad(want.sum(), x)
    got = logps_with_grad_(logits, labels, upstream).logps
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["forward", "jsd"])
@pytest.mark.parametrize("width", [width // 2 for width in WIDTHS])
def test_kl(gpu, width, kind):
    student, teacher = (torch.randn(2, width) for _ in range(2))
    want = kl_ref(student.double(), teacher.double(), kind=kind)
    torch.testing.assert_close(kl(student, teacher, kind=kind).double(), want, rtol=3e-6, atol=0)
    got = kl_with_grad_(student, teacher, torch.ones(2), kind=kind)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=0)
