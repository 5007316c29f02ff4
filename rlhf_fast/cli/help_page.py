"""`rlhf-fast COMMAND --help`: the main options on a screen, the others by group.

Some commands have hundreds of options in dozens of groups, so a group is shown when asked for.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from rlhf_fast.errors import UserError, did_you_mean

ALWAYS_SHOWN = ("", "data")
FLAGS = ("-h", "--help")
# A group's title is a line of its own, in a frame on some terminals.
_TITLE = re.compile(r"(?m)^(?:╭─)? (?:([\w.-]+) )?options[ ─╮]*$")


def requested(arguments: list[str]) -> str | None:
    """What `--help` is asked about: a group's name, "" for an overview; None: nothing is."""
    at = next((i for i, word in enumerate(arguments) if word in FLAGS), None)
    if at is None:
        return None
    following = arguments[at + 1 : at + 2]
    return following[0] if following and not following[0].startswith("-") else ""


def page(parse: Callable[[list[str]], object], command: str, topic: str) -> str:
    """The part of the full help that `topic` names: a group with its subgroups, or `all`."""
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        parse(["--help"])
    full = re.sub(r"\s*\(default: ''\)| +(?m:$)", "", captured.getvalue())
    full = re.sub(r"(?m)(?:^ {8}\S.*\n)+", _filled, full)
    start = _TITLE.search(full).start()
    full = _filled_paragraphs(full[:start]) + full[start:]
    titles = list(_TITLE.finditer(full))
    ends = [*(title.start() for title in titles[1:]), len(full)]
    groups = {t[1] or "": full[t.start() : end] for t, end in zip(titles, ends)}
    if topic == "all":
        return full
    if topic:
        found = [text for name, text in groups.items() if f"{name}.".startswith(f"{topic}.")]
        if not found:
            raise UserError(f"no group of options is called {topic!r}{did_you_mean(topic, groups)}")
        return "".join(found)
    shown = [groups[name] for name in ALWAYS_SHOWN if name in groups]
    return "".join([full[: titles[0].start()], *shown, *_other(groups, command)])


def _filled(paragraph: re.Match[str]) -> str:
    """Without the line breaks of the source, which tyro keeps."""
    text, indent = " ".join(paragraph[0].split()), " " * 8
    return f"{textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent)}\n"


def _filled_paragraphs(text: str) -> str:
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]
    lines = [textwrap.fill(part, 80, break_on_hyphens=False) for part in paragraphs]
    return "\n\n".join(lines) + "\n\n"


def _other(groups: dict[str, str], command: str) -> Iterable[str]:
    names = [name for name in groups if "." not in name and name not in ALWAYS_SHOWN]
    if names:
        yield " more options, in groups\n"
        yield from (f"  {name:<12} {_summary(groups[name])}\n" for name in names)
        yield f"\n`{command} --help {names[0]}` lists a group, `{command} --help all` everything.\n"


def _summary(group: str) -> str:
    """The text between a group's title and the rule above its options."""
    parts = re.split(r"(?m)^[│ ]*[─-]{20,}.*$", _TITLE.sub("", group, count=1))
    return " ".join(parts[-2].replace("│", " ").split()) if len(parts) > 1 else ""


def settings_table(changes: dict[str, dict[str, Any]]) -> str:
    """Names and the settings that each stands for."""
    lines = []
    for name, settings in sorted(changes.items()):
        text = f"{name:<20} " + "  ".join(f"{k}={v}" for k, v in _flat(settings))
        lines += textwrap.wrap(
            text, 100, subsequent_indent=" " * 21, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
