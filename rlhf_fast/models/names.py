"""Names of models: directories, or models of the Hugging Face hub, which is asked once.

A folder of LoRA adapters, as training with `lora` leaves, stands for its base with them merged in.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from rlhf_fast.errors import UserError
from rlhf_fast.plugins import load_function

HUB_TIMEOUT_S = 1.5
"""How long the hub may take to answer whether it has a model."""
MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
"""What of a hub's model is downloaded: weights, configuration and tokenizer, but no code."""


def resolve_model(name: str, argument: str = "model") -> str:
    """A directory or hub name that was found; `module:function` is called for it.

    `argument` is where the user gave the name; an error begins with it.
    """
    if ":" in name and "/" not in name:
        name = load_function(name)()
    check_model_name(name, argument)
    return name


def model_directory(name: str, argument: str = "model") -> Path:
    """The directory of a model, which is downloaded if it is the hub's."""
    check_model_name(name, argument)
    path = Path(name)
    return path if path.is_dir() else Path(snapshot_download(name, allow_patterns=MODEL_FILES))


def base_of_adapters(path: str | Path) -> str | None:
    """The model that the folder's adapters belong to; None if it holds none."""
    settings = Path(path) / "adapter_config.json"
    if not settings.is_file():
        return None
    name = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{settings} must name its base_model_name_or_path, got {name!r}")
    return name


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
        _look_up(name, argument)


def check_directory(name: str, argument: str = "model") -> None:
    """Refuses what can only be a directory and is none; other names may be the hub's."""
    path = Path(name)
    if path.is_dir():
        if (base := base_of_adapters(path)) is not None:
            check_model_name(base, f"{argument}: the base of the adapters in {name}")
        return
    if path.is_file():
        raise UserError(f"{argument}: {name} is a file; give the directory that holds the model")
    is_path = name.startswith((".", "/", "~")) or ("/" in name and path.parent.is_dir())
    if not is_path:
        try:
            validate_repo_id(name)
        except HFValidationError:
            is_path = True
    if is_path and not _is_cached(name):
        raise UserError(f"{argument}: no such model directory: {name}")


def _is_cached(name: str) -> bool:
    try:
        files = [try_to_load_from_cache(name, f) for f in ("config.json", "adapter_config.json")]
    except HFValidationError:
        return False
    return any(isinstance(file, str) for file in files)


@functools.cache
def _look_up(name: str, argument: str) -> None:
    """Asks the hub without the retries of loading, which take most of a minute."""
    hub = HfApi()
    missing = f"{argument}: there is no directory {name!r}, and {hub.endpoint}"
    try:
        hub.model_info(name, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            return  # the hub is there, but busy: loading tries again
        raise UserError(
            f"{missing} has no such model, or shows it to others only (`hf auth login`)"
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{missing} cannot be reached ({str(error).splitlines()[0]}); give a model directory"
        ) from error
