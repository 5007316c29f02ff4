"""Model checkpoints: complete directories that any Hugging Face tool can load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_directory_atomic
from rlhf_fast.models.adapters import has_adapters, merge_saved_adapters
from rlhf_fast.models.names import base_of_adapters, check_model_name, model_directory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

UNREADABLE = (OSError, ValueError, SafetensorError)
"""What loading a model raises where files are missing, damaged or of another kind."""
ADAPTED_CONFIG = "adapted_config.json"
"""The whole model's config in a folder of adapters; as `config.json` it would hide them."""


def load_pretrained(
    kind: type, path: str | Path, purpose: str, **options
) -> tuple[PreTrainedModel, set[str]]:
    """A model of one of transformers' Auto classes, from a directory or a hub name.

    Safetensors only, no remote code; adapters are merged into their base. The second result names
    the parameters that are new, as no file has them. An error begins with "cannot " and `purpose`.
    """
    check_model_name(str(path))
    base = base_of_adapters(path)
    options |= {"trust_remote_code": False, "use_safetensors": True}
    try:
        model, found = kind.from_pretrained(base or path, output_loading_info=True, **options)
        new = set(found["missing_keys"])
        if base is not None:
            model, trained = merge_saved_adapters(model, model_directory(path))
            new -= trained
    except UNREADABLE as error:
        raise UserError(f"cannot {purpose} from {str(path)!r}: {error}") from error
    check_not_shared_out(model)
    model.name_or_path = str(path)  # which PEFT writes down as the base of new adapters
    return model, new


def check_not_shared_out(model: nn.Module) -> None:
    """Refuses weights of which every process holds a share, as DeepSpeed's ZeRO-3 leaves them."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "the model must be whole, got DeepSpeed's shares of its weights, as transformers loads "
            "them once an `Accelerator()` for ZeRO-3 is made: load the model before that; training "
            "shares it out"
        )


def load_text_config(path: str | Path) -> PretrainedConfig:
    """The configuration of a model's decoder; that of the base for a folder of adapters."""
    from transformers import AutoConfig

    source = base_of_adapters(path) or path
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    except UNREADABLE as error:
        raise UserError(f"cannot read the configuration of {str(path)!r}: {error}") from error


def check_known(token_id: int, config: PretrainedConfig) -> None:
    """Refuses a token that the model has no embedding for; a GPU would only say `assert`."""
    size = getattr(config, "vocab_size", None)
    if size is not None and token_id >= size:
        raise UserError(
            f"the tokenizer gives token {token_id}, but the model's vocabulary has {size}: take "
            f"the tokenizer of this model, or call model.resize_token_embeddings(len(tokenizer)) "
            f"and save the model again"
        )


def check_complete(path: str | Path, model: PreTrainedModel, new: Iterable[str]) -> None:
    """Refuses a model of which some parameters were in no file: they are random."""
    if absent := sorted(new):
        saved_as = ", ".join(model.config.architectures or ["something else"])
        others = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        trained = " (`rlhf-fast reward` trains one)" if absent == ["score.weight"] else ""
        raise UserError(
            f"{str(path)!r} is no {type(model).__name__}: it has no weights for "
            f"{', '.join(absent[:3])}{others}, which would be random; it was saved as {saved_as}: "
            f"give a model that has them{trained}"
        )


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Saves weights (safetensors, in the model's dtype), config and tokenizer, all or nothing.

    Of a model with adapters only these are saved, and the config, which tells what its head gives.
    `add` writes further files into the directory.
    """

    def fill(directory: Path) -> None:
        model.save_pretrained(directory)
        if has_adapters(model):
            model.config.to_json_file(directory / ADAPTED_CONFIG)
        tokenizer.save_pretrained(directory)
        add(directory)

    write_directory_atomic(path, fill)


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """Loads a checkpoint's weights into a model of the same shape, in place."""
    state: dict[str, torch.Tensor] = {}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no .safetensors file in this checkpoint")
    for file in files:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file}: damaged checkpoint ({error})") from error
    if (path / "adapter_model.safetensors").exists():
        return _load_adapters(path, state, model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise UserError(
            f"{path}: does not fit {type(model).__name__}: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}"
        )
    model.tie_weights()


def _load_adapters(path: Path, state: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    from peft import set_peft_model_state_dict

    if not has_adapters(model):
        raise UserError(f"{path}: holds adapters, but {type(model).__name__} has none to load into")
    # Names on disk carry the prefix of PEFT's own wrapper, which this model does not have.
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    result = set_peft_model_state_dict(model, state, model.active_adapters()[0])
    if result.unexpected_keys:
        raise UserError(f"{path}: does not fit the adapters: {result.unexpected_keys[:3]}")
