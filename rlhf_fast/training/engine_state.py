"""What a checkpoint holds of model, optimiser and average: whole tensors by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.training.optimizer import WeightAverage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = dict[str, dict[str, Tensor]]
"""Kind ("weights", "optimizer", "average") -> name -> tensor; a moment's name is WEIGHT|KEY."""


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> State:
    """Everything that is trained, for the first process to write.

    What is spread over processes as DTensors is gathered to there, one at a time.
    """
    weights = trained(model)
    moments = {
        moment_name(name, key): value
        for name, weight in weights.items()
        for key, value in optimizer.state[weight].items()
    }
    state = {"weights": weights, "optimizer": moments, "average": _average(weights, average)}
    return {kind: {n: _whole(t.detach()) for n, t in v.items()} for kind, v in state.items()}


def load_state(
    saved: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> None:
    """Puts in place what `state_of` gave."""
    weights = trained(model)
    copy_into(weights, saved["weights"])
    for (name, key), value in split_moments(saved).items():
        # load_state_dict would cast and index by number; this keeps names and dtypes.
        weight = weights[name]
        moment = value.to(weight.device) if value.dim() == 0 else _like(weight, value)
        optimizer.state[weight][key] = moment
    copy_into(_average(weights, average), saved["average"])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moment_name(weight: str, key: str) -> str:
    return f"{weight}|{key}"


def split_moments(saved: State) -> dict[tuple[str, str], Tensor]:
    """(name of the weight, key) -> moment."""
    return {tuple(name.rsplit("|", 1)): value for name, value in saved["optimizer"].items()}


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    check_names(targets, saved)
    for name, target in targets.items():
        target.copy_(_like(target, saved[name]))


def check_names(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if targets.keys() != saved.keys():
        different = sorted(targets.keys() ^ saved.keys())
        raise UserError(f"the checkpoint holds other tensors than the model: {different[:3]}")


def _average(weights: dict[str, nn.Parameter], average: WeightAverage | None) -> dict[str, Tensor]:
    if average is None:
        return {}
    names = {id(weight): name for name, weight in weights.items()}
    return {names[id(p)]: value for p, value in zip(average.parameters, average.values)}


def _like(target: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `target`, and spread over processes as that is."""
    if not hasattr(target, "full_tensor"):
        return value.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _whole(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor.contiguous()
    whole = tensor.full_tensor()  # no GPU has room for all of them
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def gathered(model: PreTrainedModel, keep: bool = True) -> PreTrainedModel:
    """The model with whole parameters, if they were spread over processes and this one keeps them.

    All processes take part, a parameter at a time.
    """
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model
    state = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if keep:
            state[name] = value.cpu()
    if not keep:
        return model
    with torch.device("meta"):  # the values are at hand
        whole = type(model)(model.config)
        for name, adapter in getattr(model, "peft_config", {}).items():
            whole.add_adapter(adapter, name)
    whole.load_state_dict(state, assign=True)  # in their own dtype
    whole.tie_weights()
    for name, module in whole.named_modules():  # beside the state: what rotary embeddings keep
        own = model.get_submodule(name)
        module._buffers.update(own._buffers)
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, key, getattr(own, key))
    if model.can_generate():
        whole.generation_config = model.generation_config
    return whole
