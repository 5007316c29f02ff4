"""Shared by the op tests: where an op runs, and how its error is judged."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rlhf_fast.ops import native


def _has_emulation() -> bool:
    try:
        from rlhf_fast import _emulated  # noqa: F401
    except ImportError:
        return False
    return True


def _backends():
    yield pytest.param("cpu")
    yield pytest.param(
        "emulated",
        marks=pytest.mark.skipif(not _has_emulation(), reason="built without RLHF_FAST_EMULATE=ON"),
    )
    yield pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=_backends())
def device(request) -> str:
    """The device to put tensors on; under `emulated`, ops on the CPU run the CUDA kernels."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with native.emulated_cuda() if request.param == "emulated" else contextlib.nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def hardware(request) -> str:
    """A device that is really there, for tests too long for the emulated kernels."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request) -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def assert_as_accurate(name, got, plain, truth, factor=2.0, least=2.0**-23):
    """RMS error against float64 `truth` at most `factor` times that of plain PyTorch.

    `least`, the spacing of float32 numbers, times the largest value is always allowed: where plain
    PyTorch happens to be exact, that is no flaw.
    """
    got, plain, truth = (t.detach().double().cpu() for t in (got, plain, truth))
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    finite = truth.isfinite()
    same = torch.where(truth.isnan(), got.isnan(), got == truth)
    assert same[~finite].all(), f"{name}: infinities or NaN in other places"
    if not finite.any():
        return
    error = torch.where(finite, got - truth, 0.0)
    rms = error.square().mean().sqrt().item()
    plain_rms = torch.where(finite, plain - truth, 0.0).square().mean().sqrt().item()
    spacing = least * max(torch.where(finite, truth, 0.0).abs().max().item(), 1.0)
    worst = error.abs().argmax()
    assert rms <= max(factor * plain_rms, spacing), (
        f"{name}: RMS error {rms:.2e}, plain PyTorch {plain_rms:.2e}; worst at {worst.item()}: "
        f"got {got.flatten()[worst].item():.9g}, truth {truth.flatten()[worst].item():.9g}"
    )


@pytest.fixture(autouse=True)
def cut_small_logits_too(monkeypatch):
    """Fused heads take small logits whole; here they are cut as large ones are."""
    monkeypatch.setattr("rlhf_fast.ops.head.SMALL_BYTES", 0)
