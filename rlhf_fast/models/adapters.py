"""LoRA adapters through PEFT: the trained part of a model whose own weights stay as they are."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf_fast.errors import UserError
from rlhf_fast.models.names import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on the decoder's linear layers; the head is frozen."""

    rank: int = 16
    """Rank of the update of each weight matrix."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' inputs."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get an adapter; none: every linear layer of the decoder."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora: rank must be >= 1, alpha > 0 and dropout in [0, 1), "
                f"got {self.rank}, {self.alpha}, {self.dropout}"
            )


@dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """LoRA: adapters are trained instead of the weights; without them a policy is its reference."""

    rank: int = 0
    """Rank of the update of each weight matrix; 0 trains the weights themselves."""

    def __post_init__(self) -> None:
        if self.rank:
            super().__post_init__()


def add_lora(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    trained_modules: tuple[str, ...] = (),
    seed: int = 0,
    name: str = "default",
) -> None:
    """Freezes the model and gives it adapters, in place; `trained_modules` are trained in full.

    Adapters of another `name` may be there; the new ones are those in use. The output is unchanged
    until they are trained: their second factor starts at zero. The first one is drawn from `seed`,
    in every process of a launch the same.
    """
    peft = _peft()
    check_whole(model.name_or_path, "lora: the base of new adapters")
    others = getattr(model, "peft_config", {}).values()  # around whose parts all linear layers lie
    targets = list(config.target_modules) or next((list(o.target_modules) for o in others), None)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets or "all-linear",
        exclude_modules=list(trained_modules) or None,
        modules_to_save=list(trained_modules) or None,
        task_type="SEQ_CLS" if trained_modules else "CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # PEFT sees to it
        torch.manual_seed(seed)
        model.add_adapter(settings, name)
    for parameter in model.parameters():  # PEFT gives them the dtype of the layer
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def inside_of(model: nn.Module) -> nn.Module:
    """The model with its adapters that PEFT's wrapper holds."""
    for settings in getattr(model, "peft_config", {}).values():
        if settings.is_prompt_learning:
            raise UserError(
                f"adapters must be parts of the model's layers, got {settings.peft_type.value}, "
                f"which adds to its inputs; take LoRA"
            )
    return model.get_base_model()


def describe_adapters(model: nn.Module) -> str:
    """What is used of a model's adapters, and how, beside their weights."""
    active = sorted({n for m in model.modules() if _is_adapted(m) for n in m.active_adapters})
    settings = [model.peft_config[name].to_dict() for name in active]
    return json.dumps([active, settings], sort_keys=True, default=lambda x: sorted(map(str, x)))


def has_adapters(model: nn.Module) -> bool:
    return any(map(_is_adapted, model.modules()))


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it got adapters; afterwards all is as it was."""
    adapted = [m for m in model.modules() if _is_adapted(m) and not m.disable_adapters]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)
        for parameter in model.parameters():  # PEFT trains whatever it enables
            if parameter.requires_grad != (id(parameter) in trained):
                parameter.requires_grad_(id(parameter) in trained)


def merge_saved_adapters(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """The model with the adapters of a folder added to its weights.

    Modules that were trained in full beside the adapters take the place of the model's; the second
    result names the tensors that did.
    """
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(folder))
    if settings.peft_type != "LORA":
        raise UserError(
            f"{folder}: adapters must be of kind LORA, got {settings.peft_type.value}; merge them "
            f"into their base with PEFT's merge_and_unload"
        )
    settings.task_type = None  # a language model's adapters fit its decoder under another head, too
    saved = peft.load_peft_weights(str(folder), device="cpu")
    # Loaded by transformers, and then merged, a model would be saved under the adapters' names.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        adapted = peft.get_peft_model(model, settings)
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(name for name in own.keys() - saved.keys() if ".lora_" in name):
        raise UserError(f"{folder}: adapters must be complete, got none for {missing[:3]}")
    # A head of another kind may have a bias where the trained one has none: it stays as it is.
    peft.set_peft_model_state_dict(adapted, own | saved)
    trained = {name.removeprefix("base_model.model.") for name in saved}
    return adapted.merge_and_unload(safe_merge=True).requires_grad_(True), trained


def merge_adapters(model: PreTrainedModel) -> None:
    """Adds the adapters to the weights and removes them, in place."""
    for name, module in list(model.named_modules()):
        if not _is_adapted(module):
            continue
        if hasattr(module, "modules_to_save"):
            result = module.modules_to_save[module.active_adapters[0]]
        else:
            module.merge(safe_merge=True)
            result = module.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, result)
    model._hf_peft_config_loaded = False
    if hasattr(model, "peft_config"):
        del model.peft_config


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) of the model that `merge_adapters` would leave, one tensor at a time.

    Without adapters these are the parameters themselves.
    """
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        owner = layer.removesuffix(".base_layer")
        if owner in adapted and owner != layer:
            whole = copy.deepcopy(adapted[owner])  # DoRA adds more than the product of its factors
            whole.merge()
            yield f"{owner}.{kind}", getattr(whole.get_base_layer(), kind).detach()
        elif not any(name.startswith(f"{other}.") for other in adapted):
            yield name, parameter.detach()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"LoRA needs peft: pip install peft ({error})") from error
    return peft


def _is_adapted(module: nn.Module) -> bool:
    """Whether PEFT put this module in the place of one of the model's."""
    is_wrapper = hasattr(module, "modules_to_save") and hasattr(module, "original_module")
    return is_wrapper or (hasattr(module, "base_layer") and hasattr(module, "enable_adapters"))
