"""Errors whose message is meant for the user: the CLI prints it alone and exits with code 1."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used; says what came and what to do."""


class ToldElsewhere(UserError):
    """The same in the other processes of a launch, where one of them tells the user."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: the known ones near it, if any."""
    close = [f"`{prefix}{other}`" for other in difflib.get_close_matches(name, list(known), 2)]
    return f"; did you mean {' or '.join(close)}?" if close else ""
