"""DeepSpeed's ZeRO as an engine: optimiser, gradients and weights are spread over processes.

Only the sharding is DeepSpeed's. Weights are float32 and products are cast by autocast, as with the
other engines; batches, learning rate and clipping are the trainer's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.training.engine import Calls, Engine, LockstepEngine, ReplicatedEngine
from rlhf_fast.training.engine_state import (
    State,
    check_names,
    moment_name,
    split_moments,
    trained,
)
from rlhf_fast.training.optimizer import OptimizerConfig, WeightAverage

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_zero_engine(
    backbone: Backbone,
    config: OptimizerConfig,
    accelerator: Accelerator,
    settings: dict[str, Any],
) -> Engine:
    """The engine for the stage of these settings; stage 0 shares out nothing but examples."""
    if not torch.distributed.is_initialized():
        raise UserError("DeepSpeed: start its processes by `accelerate launch` or torchrun")
    if settings.get("zero_optimization", {}).get("stage", 0) == 0:
        return ReplicatedEngine(backbone, config, accelerator)
    if config.merging.rule is not None:
        raise UserError("optimizer.merging needs whole weights: launch without DeepSpeed's ZeRO")
    return ZeroEngine(backbone, config, accelerator, settings)


class ZeroEngine(LockstepEngine):
    """Stage 1, 2 or 3; `parameters` are this process's shares of the weights, flat."""

    def __init__(
        self,
        backbone: Backbone,
        config: OptimizerConfig,
        accelerator: Accelerator,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(backbone, config, accelerator)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        device = deepspeed.get_accelerator().device_name()
        if device != backbone.device.type:
            raise UserError(
                f"DeepSpeed computes on {device}, the model is on {backbone.device.type}: "
                f"give --device {device}, or set DS_ACCELERATOR={backbone.device.type}"
            )
        self.tied, self.device = contextlib.nullcontext, backbone.device
        self.module = deepspeed.initialize(
            model=Calls(backbone.model),
            optimizer=self.optimizer,
            config={
                **settings,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )[0]
        self.zero = self.module.optimizer
        self.is_stage_3 = self.module.zero_optimization_stage() == 3
        if self.is_stage_3:
            self.parameters = self.zero.fp32_partitioned_groups_flat
        else:
            self.parameters = self.zero.single_partition_of_fp32_groups

    def _begin(self, is_last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(is_last)

    def _backward(self, loss: Tensor) -> None:
        self.module.backward(self.num_processes * loss)  # averaged, as FSDP does

    def clip(self, max_norm: float) -> float:
        """The norm before; DeepSpeed's own step scales down to its `gradient_clipping`."""
        zero = self.zero
        norms = zero._get_norm_groups() if self.is_stage_3 else [zero.scaled_global_norm()]
        norms = [float(norm) for norm in norms]
        if min(norms) < 0:  # how DeepSpeed says that it is not finite
            return float("nan")
        return sum(norm**2 for norm in norms) ** 0.5

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()

    def state(self, average: WeightAverage | None) -> State:
        self._link_moments()
        weights = trained(self.backbone.model)
        state = {
            "weights": self._whole_weights(),
            "optimizer": {
                moment_name(name, key): safe_get_full_optimizer_state(weight, key).cpu()
                for name, weight in weights.items()
                for key in MOMENTS
            },
            "average": {},
        }
        count = self.optimizer.state[self.parameters[0]]["step"].cpu()
        state["optimizer"] |= {moment_name(name, "step"): count.clone() for name in weights}
        if average:
            with self._averaged(average):
                state["average"] = self._whole_weights()
        return state

    def load_state(self, saved: State, average: WeightAverage | None) -> None:
        self._link_moments()
        weights = trained(self.backbone.model)
        if average:
            with self._averaged(average):
                self._set_weights(saved["average"])
        self._set_weights(saved["weights"])
        for (name, key), value in split_moments(saved).items():
            if key in MOMENTS:
                safe_set_full_optimizer_state(weights[name], value, key)
        count = next(v for (_, key), v in split_moments(saved).items() if key == "step")
        for share in self.parameters:
            self.optimizer.state[share]["step"].copy_(count)

    def finish(self) -> None:
        """Makes the model an ordinary one again, whole in every process."""
        model, own = self.backbone.model, {}
        values = self._whole_weights(self.device)
        self.optimizer.state.clear()
        for name, parameter in model.named_parameters():
            value = values.get(name)
            if value is None:
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().clone()
            own[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        self.module.destroy()
        for module in model.modules():
            # The old ones, and the dictionaries they lie in, are DeepSpeed's.
            module._parameters = {n: own.get(id(p)) for n, p in dict.items(module._parameters)}
            vars(module).pop("_original_parameters", None)
        del self.module, self.zero, self.parameters

    @torch.no_grad()
    def _whole_weights(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What the optimiser made of the weights, each once; all processes must call it."""
        named = trained(self.backbone.model).items()
        return {name: safe_get_full_fp32_param(p).to(device).clone() for name, p in named}

    @torch.no_grad()
    def _set_weights(self, saved: dict[str, Tensor]) -> None:
        """Both in the optimiser and in the model."""
        weights = trained(self.backbone.model)
        check_names(weights, saved)
        for name, weight in weights.items():
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.copy_(saved[name])
            safe_set_full_fp32_param(weight, saved[name].to(weight.device))

    @contextlib.contextmanager
    def _averaged(self, average: WeightAverage) -> Iterator[None]:
        """The average in the place of the optimiser's weights."""
        self._swap(average)
        yield
        self._swap(average)

    @torch.no_grad()
    def _swap(self, average: WeightAverage) -> None:
        for share, value in zip(self.parameters, average.values):
            kept = share.clone()
            share.copy_(value)
            value.copy_(kept)

    def _link_moments(self) -> None:
        """Stages 1 and 2 find a weight's moments from their first step on, unless told to look."""
        if not self.is_stage_3:
            self.zero._lazy_init_hp_params_optimizer_state()
