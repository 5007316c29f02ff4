"""Errors whose message is meant for the user: the CLI prints it alone and exits with code 1."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any


class UserError(Exception):
    """Something the user gave cannot be used; says what came and what to do."""


class ToldElsewhere(UserError):
    """The same in the other processes of a launch, where one of them tells the user."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: the known ones near it, if any."""
    close = [f"`{prefix}{other}`" for other in difflib.get_close_matches(name, list(known), 2)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def refuse_unused(
    config: Any, where: str, choice: str, users: Mapping[str, Collection[Any]]
) -> None:
    """Raises for settings of a dataclass that its choice would ignore.

    `users` names for each such setting the values of the field `choice` that use it; elsewhere it
    must have its default.
    """
    chosen = getattr(config, choice)
    for setting in fields(config):
        if chosen in users.get(setting.name, (chosen,)):
            continue
        made = setting.default is MISSING and setting.default_factory is not MISSING
        value = getattr(config, setting.name)
        if value != (setting.default_factory() if made else setting.default):
            raise UserError(
                f"{where}.{setting.name}: {choice} {chosen} makes no use of it, got {value}; "
                f"leave it out"
            )
