"""The Hugging Face hub, asked once whether it has what the user names, before anything is loaded.

Loading itself tries again for most of a minute when the hub cannot be reached.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from rlhf_fast.errors import UserError

TIMEOUT_S = 1.5
ADAPTERS = "adapter_config.json"
"""The file that a model of adapters has, and that names its base."""


def is_path(name: str) -> bool:
    """Whether a name can only be a path: by its form, or because its folder is here."""
    if name.startswith((".", "/", "~")) or ("/" in name and Path(name).parent.is_dir()):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


@functools.cache
def look_up(kind: Literal["model", "dataset"], name: str, argument: str) -> None:
    """Refuses what the hub lacks; `argument` is where the user gave the name.

    Of adapters it brings the file into the cache by which they are known as such.
    """
    hub = HfApi()
    place = "model directory" if kind == "model" else "file"
    missing = f"{argument}: no such {place}: {name}, and {hub.endpoint}"
    try:
        files = hub.repo_info(name, repo_type=kind, timeout=TIMEOUT_S).siblings or ()
        if ADAPTERS in (file.rfilename for file in files):
            hub.hf_hub_download(name, ADAPTERS, repo_type=kind)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            return  # the hub is there, but busy: loading tries again
        raise UserError(
            f"{missing} has no such {kind}, or shows it to others only (`hf auth login`)"
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{missing} cannot be reached ({str(error).splitlines()[0]})") from error
