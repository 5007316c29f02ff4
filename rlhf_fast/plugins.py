"""The user's own Python functions, named `module:function`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError


def load_function(name: str) -> Callable[..., Any]:
    """Imports `module:function`; the current directory is searched as `python -m` would."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"a function must be named as module:function, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise UserError(f"{name}: importing {module_name} failed: {error}") from error
        raise UserError(f"{name}: no module {module_name!r} here or installed") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name}: {module_name} has no function {function_name!r}")
    return function


def place_of(error: Exception) -> str:
    """` (rewards.py, line 12)`: where in the user's file its function raised; empty if it did not
    begin."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one called the function
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
