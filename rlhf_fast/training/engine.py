"""Gradients and optimiser steps on one process, or on many through Accelerate."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.launch import launched_with
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.ops import matmul
from rlhf_fast.training.engine_state import load_state, state_of
from rlhf_fast.training.gradients import Gradients
from rlhf_fast.training.optimizer import OptimizerConfig, WeightAverage, make_optimizer
from rlhf_fast.training.zero_config import zero_config

if TYPE_CHECKING:
    from accelerate import Accelerator

Part = TypeVar("Part")
Compute = Callable[[list[int]], tuple[Tensor, dict[str, Tensor | float]]]
"""Indices of a micro-batch -> (its part of the loss, its part of each metric)."""

INSTEAD = (
    "launch FSDP2 (`distributed_type: FSDP` with `fsdp_version: 2`, as docs/examples/fsdp2.yaml), "
    "DeepSpeed (as docs/examples/deepspeed_zero3.yaml) or plain processes"
)
"""Of launches that are refused."""

REDUCE_BYTES = 64 << 20
"""Gradients that are summed over processes in one call."""


class Engine:
    """One process."""

    rank = 0
    num_processes = 1

    def __init__(self, backbone: Backbone, config: OptimizerConfig) -> None:
        self.backbone, self.tied = backbone, backbone.tied
        self.optimizer = make_optimizer(backbone.model, config)
        self.parameters = [p for p in backbone.model.parameters() if p.requires_grad]
        self.gradients = Gradients(self.parameters, backbone.try_decoder)

    def accumulate(self, sizes: Sequence[int], compute: Compute) -> dict[str, float]:
        """Adds up the gradient of a batch; returns its loss and metrics."""
        metrics: dict[str, Tensor | float] = defaultdict(float)
        parts = self.backbone.micro_batches(sizes)
        self.gradients.expect(len(parts))
        for part in parts:
            self._micro_batch(part, compute, metrics)
        return {name: float(value) for name, value in metrics.items()}

    @torch.no_grad()
    def measure(self, sizes: Sequence[int], compute: Compute) -> float:
        """What `compute` gives in place of a loss, summed over a batch, without gradient."""
        with self.backbone.evaluating():
            return self.accumulate(sizes, compute)["loss"]

    def _micro_batch(
        self, part: list[int], compute: Compute, metrics: dict[str, Tensor | float]
    ) -> None:
        with matmul.fast_float32(), self.tied():
            value, numbers = compute(part)
            if torch.is_grad_enabled():
                self._backward(value)
        metrics["loss"] += value.detach()
        for name, number in numbers.items():
            metrics[name] += number

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, max_norm: float) -> float:
        """Scales the gradient down to `max_norm`; returns its norm before."""
        norm = self.gradients.clip(max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.gradients.step(self.optimizer)

    def state(self, average: WeightAverage | None) -> dict[str, dict[str, Tensor]]:
        """Whole tensors by kind and name, to be saved; all processes must call it."""
        return state_of(self.backbone.model, self.optimizer, average)

    def load_state(
        self, saved: dict[str, dict[str, Tensor]], average: WeightAverage | None
    ) -> None:
        """Puts in place what `state` gave."""
        load_state(saved, self.backbone.model, self.optimizer, average)

    def wait(self) -> None:
        """Until all processes are here."""

    def finish(self) -> None:
        """Lets the model be called by itself again."""


class ReplicatedEngine(Engine):
    """The whole model in every process; gradients are summed once per step.

    A loss divides by the whole batch, so the sum over processes is the batch's gradient, however
    its examples are shared out and however many micro-batches that makes.
    """

    def __init__(
        self, backbone: Backbone, config: OptimizerConfig, accelerator: Accelerator
    ) -> None:
        super().__init__(backbone, config)
        self.accelerator = accelerator
        self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes

    def accumulate(self, sizes: Sequence[int], compute: Compute) -> dict[str, float]:
        share = share_out(sizes, self.num_processes)[self.rank]
        metrics: dict[str, Tensor | float] = defaultdict(float)
        for part in self.backbone.micro_batches([sizes[i] for i in share]) if share else []:
            self._micro_batch([share[i] for i in part], compute, metrics)
        if torch.is_grad_enabled():
            self._sum_gradients()
        return self._sum_metrics(metrics)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        bucket: list[Tensor] = []
        size = 0
        for parameter in self.parameters:
            if parameter.grad is None:  # reached by no token of this process
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
            if size >= REDUCE_BYTES or parameter is self.parameters[-1]:
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                torch.distributed.all_reduce(flat)
                pieces = flat.split([gradient.numel() for gradient in bucket])
                for gradient, piece in zip(bucket, pieces):
                    gradient.copy_(piece.view_as(gradient))
                bucket, size = [], 0

    def _sum_metrics(self, metrics: dict[str, Tensor | float]) -> dict[str, float]:
        # A process without examples does not know the names.
        names = sorted({n for part in _gather(sorted(metrics)) for n in part})
        values = [float(metrics.get(name, 0.0)) for name in names]
        total = torch.tensor(values, dtype=torch.float64, device=self.backbone.device)
        torch.distributed.all_reduce(total)
        return dict(zip(names, total.tolist()))


class LockstepEngine(ReplicatedEngine):
    """What is spread over processes is exchanged as they compute: all run as many micro-batches."""

    module: Callable[[Compute, list[int]], tuple[Tensor, dict]]
    """Runs a computation where the model's parameters can be read."""

    def accumulate(self, sizes: Sequence[int], compute: Compute) -> dict[str, float]:
        plans = []
        for share in share_out(sizes, self.num_processes):
            parts = self.backbone.micro_batches([sizes[i] for i in share]) if share else []
            plans.append([[share[i] for i in part] for part in parts])
        metrics: dict[str, Tensor | float] = defaultdict(float)
        ours, turns = plans[self.rank], max(map(len, plans))
        for turn in range(turns):
            self._begin(is_last=turn == turns - 1)
            if turn < len(ours):
                self._micro_batch(ours[turn], lambda p: self.module(compute, p), metrics)
            else:  # the others need this process for its share
                smallest = min(range(len(sizes)), key=sizes.__getitem__)
                value, _ = self.module(compute, [smallest])
                if torch.is_grad_enabled():
                    self._backward(0.0 * value)
        return self._sum_metrics(metrics)

    def _begin(self, is_last: bool) -> None:
        """Before every micro-batch."""

    def _backward(self, loss: Tensor) -> None:
        # Gradients are averaged over processes; the batch's gradient is their sum.
        super()._backward(self.num_processes * loss)


class ShardedEngine(LockstepEngine):
    """FSDP2: every process holds a share of each parameter."""

    def __init__(
        self, backbone: Backbone, config: OptimizerConfig, accelerator: Accelerator
    ) -> None:
        module = Calls(backbone.model)
        if accelerator.distributed_type.value != "FSDP":  # on a CPU Accelerate leaves it out
            _shard(module, accelerator.num_processes)
        else:
            # Every process has the whole model by now; and this would untie its head.
            accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
            # Accelerate wants an optimiser of the whole weights; the engine makes its own.
            module, _ = accelerator.prepare(module, make_optimizer(backbone.model, config))
        super().__init__(backbone, config, accelerator)
        self.module, self.tied = module, contextlib.nullcontext

    def finish(self) -> None:
        self.module.unshard()  # what belongs to no layer; layers gather themselves when called
        self.accelerator.free_memory()  # or it would keep the model as long as it lives


class Calls(nn.Module):
    """Runs a computation inside the forward of a module that holds the model.

    FSDP and ZeRO gather parameters when a module's forward begins; decoder and head are used apart
    here, so both belong to this one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, compute: Compute, part: list[int]) -> tuple[Tensor, dict]:
        return compute(part)


def _shard(module: Calls, num_processes: int) -> None:
    """Every layer by itself, then the rest, as Accelerate's TRANSFORMER_BASED_WRAP does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # seconds of imports

    mesh = init_device_mesh("cpu", (num_processes,))
    for layer in module.modules():
        if type(layer).__name__ in (module._no_split_modules or ()):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def make_engine(
    backbone: Backbone, config: OptimizerConfig, accelerator: Accelerator | None
) -> Engine:
    """The engine for the way in which Accelerate was launched."""
    if accelerator is None:
        return Engine(backbone, config)
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED" or launched_with("DEEPSPEED"):
        settings = zero_config(accelerator)
        from rlhf_fast.training.zero import make_zero_engine  # needs DeepSpeed

        return make_zero_engine(backbone, config, accelerator, settings)
    # On a CPU Accelerate leaves out in silence what its launcher was asked for.
    on_cpu = launched_with("FSDP") and kind == "MULTI_CPU"
    if kind == "FSDP" or on_cpu:
        if not (os.environ.get("FSDP_VERSION") == "2" if on_cpu else accelerator.is_fsdp2):
            raise UserError(f"FSDP 1 is not supported: {INSTEAD}")
        return ShardedEngine(backbone, config, accelerator)
    if kind in ("MEGATRON_LM", "TP"):
        raise UserError(f"Accelerate's {kind} is not supported: {INSTEAD}")
    if accelerator.num_processes > 1:
        return ReplicatedEngine(backbone, config, accelerator)
    return Engine(backbone, config)


def share_out(sizes: Sequence[int], num_processes: int) -> list[list[int]]:
    """Indices for each process, about equally many tokens: longest first to who has least."""
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += sizes[index]
    return shares


def _gather(value: list[str]) -> list[list[str]]:
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
