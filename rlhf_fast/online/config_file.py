"""Configurations as YAML: `config.yaml` in a run folder, or a file that the user wrote."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlhf_fast.errors import UserError

Config = TypeVar("Config")


def config_to_yaml(config: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def config_from_yaml(path: Path, base: Config) -> Config:
    """Replaces in `base` what the file gives; unknown keys and wrong types are errors."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping, got {type(values).__name__}")
    return _replace(base, values, str(path), "")


def _replace(base: Config, values: dict[str, Any], where: str, prefix: str) -> Config:
    hints = typing.get_type_hints(type(base))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean `{prefix}{close[0]}`?" if close else ""
            raise UserError(f"{where}: unknown key `{prefix}{key}`{hint}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"{where}: `{prefix}{key}` must be a mapping, got {value!r}")
            changes[key] = _replace(current, value, where, f"{prefix}{key}.")
        else:
            changes[key] = _typed(value, hints[key], f"{where}: `{prefix}{key}`")
    return dataclasses.replace(base, **changes)


def _typed(value: Any, hint: Any, what: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        args = [a for a in args if a is not type(None)]
        if all(typing.get_origin(a) is typing.Literal for a in args):
            origin, args = typing.Literal, [x for a in args for x in typing.get_args(a)]
        else:
            return _typed(value, args[0], what)
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{what} must be one of {', '.join(map(str, args))}, got {value!r}")
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-7 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{what} must be {hint.__name__}, got {value!r}")
