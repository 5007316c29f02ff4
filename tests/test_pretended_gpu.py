"""The Python rooms with their tensors on a GPU, as far as that can be seen without one."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.online.workflow import run_online
from rlhf_fast.ops import matmul, native
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.fit import FitOptions
from tests.online.helpers import rows_without_times
from tests.pretended_gpu import pretended_gpu
from tests.tiny import tiny_model
from tests.training import trajectories

pytest.importorskip("rlhf_fast._emulated", reason="built without RLHF_FAST_EMULATE=ON")


@pytest.fixture
def gpu():
    with pretended_gpu() as devices:
        yield devices


def test_what_is_left_on_the_cpu_raises(gpu):
    x = torch.randn(4, 8, device="cuda", requires_grad=True)
    assert x.is_cuda and x.device == torch.device("cuda", 0)
    assert (x.mT @ x).sum(0).device.type == "cuda" and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="several devices"):
        x + torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="several devices"):
        torch.nn.Linear(8, 8)(x)
    gpu.syncs.clear()
    assert x.sum().item() == x.cpu().sum()
    assert sum(gpu.syncs.values()) == 2


def test_kernels_are_the_emulated_ones(gpu, monkeypatch):
    called = []
    target = native.target
    monkeypatch.setattr(native, "target", lambda t: called.append(target(t)) or called[-1])
    x = torch.randn(4, 32, device="cuda", requires_grad=True)
    out = ops.logps(x, torch.zeros(4, dtype=torch.int64, device="cuda"))
    out.logps.sum().backward()
    assert out.logps.is_cuda and x.grad.is_cuda
    assert {module.__name__ for module, *_ in called} == {"rlhf_fast._emulated"}


@pytest.mark.parametrize("refuses", [False, True])
def test_a_16_bit_product_is_added_to_a_float32_sum(gpu, refuses, monkeypatch):
    """By versions of torch that take such a sum, by those that refuse it, and by those before 2.8,
    whose product is rounded before it is added."""

    def refuse(*args, **kwargs):
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    if refuses:
        monkeypatch.setattr(torch, "addmm", refuse)
    monkeypatch.setattr(matmul, "_GPU_SLICE_BYTES", 0)
    matmul._adds_to_float32.cache_clear()
    a, b = (torch.randn(n, n, device="cuda")[:, :300].bfloat16() for n in (600, 300))
    total = torch.randn(600, 300, device="cuda")
    before, expected = total.double(), total.double() + a.double() @ b.double()
    matmul.add_product(total, a, b)
    matmul._adds_to_float32.cache_clear()
    rounding = 0.0 if hasattr(torch.ops.aten.mm, "dtype_out") else 2.0**-8
    error = 1e-4 + rounding * (expected - before).abs().max().item()
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=error)


def test_another_gpu_is_made_the_current_one_by_torch(gpu, monkeypatch):
    """Its guard does not go back to a GPU that is not in use."""
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    ops.whiten(torch.randn(8, device="cuda"))
    assert not entered
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    x = torch.randn(8, device="cuda")
    torch.testing.assert_close(ops.whiten(x).mean().item(), 0.0, atol=1e-6, rtol=0)
    assert entered == [0, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", trajectories.TASKS)
def test_training(task, precision, monkeypatch):
    optimizer = replace(trajectories.OPTIMIZER, num_epochs=1)
    monkeypatch.setattr(trajectories, "OPTIMIZER", optimizer)
    expected = trajectories.train(task, trajectories.make(task, precision=precision))
    with pretended_gpu():
        for name in ("tiny_model", "tiny_reward_model"):
            build = getattr(trajectories, name)
            monkeypatch.setattr(trajectories, name, lambda build=build: build().to("cuda"))
        model = trajectories.make(task, precision=precision)
        rows = trajectories.train(task, model)
        assert all(p.is_cuda for p in model.model.parameters())
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


@pytest.mark.parametrize("resumed_on_gpu", [True, False])
def test_a_checkpoint_resumes_on_another_machine(tmp_path, resumed_on_gpu, monkeypatch):
    """It holds the random state of the one GPU that its process had, of however many there are."""
    options = FitOptions(Checkpoints(tmp_path / "checkpoints", every_steps=20))
    with pretended_gpu():
        monkeypatch.setattr(trajectories, "tiny_model", lambda: tiny_model().to("cuda"))
        rows = trajectories.train("sft", trajectories.make("sft"), options=options)
    monkeypatch.setattr(trajectories, "tiny_model", tiny_model)
    restored = []
    with pretended_gpu() if resumed_on_gpu else contextlib.nullcontext():
        monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
        assert trajectories.train("sft", trajectories.make("sft"), options=options) == rows
    assert [state.dtype for state in restored] == [torch.uint8] * resumed_on_gpu


def test_a_run(config):
    """Fine-tuning, sampling, scoring, DPO and evaluation."""
    load_causal_lm(config.model)  # transformers prepares for all loads in its first one
    sampling = replace(config.generation.sampling, max_new_tokens=4)
    generation = replace(config.generation, num_generations=2, sampling=sampling)
    changes = {"num_iterations": 1, "precision": "bf16", "generation": generation}
    with pretended_gpu():
        report = run_online(replace(config, device="cuda", **changes))
    rows = rows_without_times(report.parent)
    assert [row["iteration"] for row in rows] == [0, 1]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=0.01)
