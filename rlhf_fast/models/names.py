"""Names of models: directories, or models of the Hugging Face hub, which is asked once.

LoRA adapters, as training with `lora` leaves, stand for their base with them merged in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rlhf_fast import hub
from rlhf_fast.errors import UserError
from rlhf_fast.hub import ADAPTERS
from rlhf_fast.plugins import load_function

CONFIGS = ("config.json", ADAPTERS)
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
    """The model that the adapters in a folder or the hub's cache belong to; None if there are none.

    What is not in the cache yet, `check_model_name` brings there.
    """
    settings = _find(path, ADAPTERS)
    if settings is None:
        return None
    name = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{settings} must name its base_model_name_or_path, got {name!r}")
    return name


def home_of_tokenizer(path: str | Path) -> str:
    """The model itself, or the base of adapters that have no tokenizer beside them."""
    base = base_of_adapters(path)
    return str(path) if base is None or _find(path, "tokenizer_config.json") else base


def check_whole(path: str | Path, purpose: str) -> None:
    """Refuses a folder of adapters where a whole model is needed."""
    if base_of_adapters(path) is not None:
        raise UserError(
            f"{purpose} needs a whole model, got adapters in {path}; merge them into their base: "
            f"`rlhf-fast merge --models {path} --output DIRECTORY`"
        )


def check_model_name(name: str, argument: str = "model") -> None:
    """Refuses a name that is no directory and no model of the hub, before hours of other work."""
    if Path(name).is_file():
        raise UserError(f"{argument}: {name} is a file; give the directory that holds the model")
    if not Path(name).is_dir() and not _is_cached(name):
        if hub.is_path(name):
            raise UserError(f"{argument}: no such model directory: {name}")
        hub.look_up("model", name, argument)
    if (base := base_of_adapters(name)) is not None:
        check_model_name(base, f"{argument}: the base of the adapters in {name}")


def _is_cached(name: str) -> bool:
    return any(_find(name, file) for file in CONFIGS)


def _find(name: str | Path, file: str) -> Path | None:
    """A file of a model's directory, or of its snapshot in the hub's cache."""
    if Path(name).is_dir():
        return path if (path := Path(name) / file).is_file() else None
    try:
        cached = try_to_load_from_cache(str(name), file)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
