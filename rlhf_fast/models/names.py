"""Names of models: directories, or models of the Hugging Face hub, which is asked once.

A folder of LoRA adapters, as training with `lora` leaves, stands for its base with them merged in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rlhf_fast import hub
from rlhf_fast.errors import UserError
from rlhf_fast.plugins import load_function

CONFIGS = ("config.json", "adapter_config.json")
"""One of which every model has."""
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
"""What of a hub's model is downloaded: weights, configuration and tokenizer, but no code."""


def resolve_model(name: str, argument: str = "model") -> str:
    """A directory or hub name that was found; `module:function` is called for it.

    `argument` is where the user gave the name; an error begins with it.
    """
    if ":" in name and "/" not in name:
        name = load_function(name)()
    check_model_name(name, argument)
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in CONFIGS):
        inside = [
            str(f.parent) for depth in ("*", "*/*") for f in path.glob(f"{depth}/config.json")
        ]
        hint = f"; there is one in {' and '.join(sorted(inside)[:3])}" if inside else ""
        raise UserError(f"{argument}: {name} holds no model, as it has no config.json{hint}")
    return name


def model_directory(
    name: str | Path, argument: str = "model", files: Sequence[str] = MODEL_FILES
) -> Path:
    """The directory of a model; of one on the hub its snapshot, with these files, in the cache."""
    path = Path(name)
    check_model_name(str(name), argument)
    if path.is_dir():
        return path
    return Path(snapshot_download(str(name), allow_patterns=list(files)))


def base_of_adapters(path: str | Path) -> str | None:
    """The model that the folder's adapters belong to; None if it holds none."""
    settings = Path(path) / "adapter_config.json"
    if not settings.is_file():
        return None
    name = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{settings} must name its base_model_name_or_path, got {name!r}")
    return name


def home_of_tokenizer(path: str | Path) -> str:
    """The model itself, or the base of adapters that have no tokenizer beside them."""
    base = base_of_adapters(path)
    return str(path) if base is None or (Path(path) / "tokenizer_config.json").is_file() else base


def check_whole(path: str | Path, purpose: str) -> None:
    """Refuses a folder of adapters where a whole model is needed."""
    if base_of_adapters(path) is not None:
        raise UserError(
            f"{purpose} needs a whole model, got adapters in {path}; merge them into their base: "
            f"`rlhf-fast merge --models {path} --output DIRECTORY`"
        )


def check_model_name(name: str, argument: str) -> None:
    """Refuses a name that is no directory and no model of the hub, before hours of other work."""
    check_directory(name, argument)
    if not Path(name).is_dir() and not _is_cached(name):
        hub.look_up("model", name, argument)


def check_directory(name: str, argument: str = "model") -> None:
    """Refuses what can only be a directory and is none; other names may be the hub's."""
    path = Path(name)
    if path.is_dir():
        if (base := base_of_adapters(path)) is not None:
            check_model_name(base, f"{argument}: the base of the adapters in {name}")
        return
    if path.is_file():
        raise UserError(f"{argument}: {name} is a file; give the directory that holds the model")
    if hub.is_path(name) and not _is_cached(name):
        raise UserError(f"{argument}: no such model directory: {name}")


def _is_cached(name: str) -> bool:
    try:
        files = [try_to_load_from_cache(name, file) for file in CONFIGS]
    except HFValidationError:
        return False
    return any(isinstance(file, str) for file in files)
