"""The Python rooms with their tensors on a GPU, as far as that can be seen without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.online.workflow import run_online
from rlhf_fast.ops import native
from tests.online.helpers import rows_without_times
from tests.pretended_gpu import pretended_gpu
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


def test_a_run(gpu, config):
    """Fine-tuning, sampling, scoring, DPO and evaluation."""
    sampling = replace(config.generation.sampling, max_new_tokens=4)
    generation = replace(config.generation, num_generations=2, sampling=sampling)
    changes = {"num_iterations": 1, "precision": "bf16", "generation": generation}
    report = run_online(replace(config, device="cuda", **changes))
    assert [row["iteration"] for row in rows_without_times(report.parent)] == [0, 1]
