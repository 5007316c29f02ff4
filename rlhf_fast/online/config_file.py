"""Configurations as YAML: `config.yaml` in a run folder, or a file that the user wrote."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlhf_fast.errors import UserError, did_you_mean

Config = TypeVar("Config")


def config_to_yaml(config: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def config_from_yaml(path: Path, base: Config) -> Config:
    """Replaces in `base` what the file gives; unknown keys and wrong types are errors."""
    return config_with(base, read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, unchecked."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of settings, got {values!r:.40}")
    return values


def config_with(base: Config, changes: dict[str, Any], where: str) -> Config:
    """`base` with what the mapping gives, checked like a file; `where` begins the errors."""
    return _replace(base, changes, where, "")


def _replace(base: Config, values: dict[str, Any], where: str, prefix: str) -> Config:
    current = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return dataclasses.replace(base, **_changes(type(base), current, values, where, prefix))


def _changes(
    kind: type, current: dict[str, Any], values: dict[str, Any], where: str, prefix: str
) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    changes = {}
    for key, value in values.items():
        if key not in hints:
            hint = did_you_mean(str(key), hints, prefix) or f"; known: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key `{prefix}{key}`{hint}")
        if dataclasses.is_dataclass(current[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: `{prefix}{key}` must be a mapping, got {value!r}")
            changes[key] = _replace(current[key], value, where, f"{prefix}{key}.")
        else:
            changes[key] = _typed(value, hints[key], f"{where}: `{prefix}{key}`")
    return changes


def _typed(value: Any, hint: Any, what: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        args = [a for a in args if a is not type(None)]
        if not all(typing.get_origin(a) is typing.Literal for a in args):
            return _typed(value, args[0], what)
        origin, args = typing.Literal, [x for a in args for x in typing.get_args(a)]
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{what} must be one of {', '.join(map(str, args))}, got {value!r}")
    if origin is tuple:
        return _items(value, args[0], what)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-7 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{what} must be {hint.__name__}, got {value!r}")


def _items(value: Any, hint: Any, what: str) -> tuple:
    if not isinstance(value, list):
        raise UserError(f"{what} must be a list, got {value!r}")
    if not dataclasses.is_dataclass(hint):
        return tuple(_typed(item, hint, what) for item in value)
    for item in value:
        if not isinstance(item, dict):
            raise UserError(f"{what}: each item must be a mapping, got {item!r}")
    return tuple(_build(hint, item, what) for item in value)


def _build(kind: type, values: dict[str, Any], what: str) -> Any:
    """A dataclass made from a mapping alone: its defaults need not be valid by themselves."""
    defaults = {}
    for item in dataclasses.fields(kind):
        missing = item.default is dataclasses.MISSING
        defaults[item.name] = item.default_factory() if missing else item.default
    return kind(**(defaults | _changes(kind, defaults, values, what, "")))
