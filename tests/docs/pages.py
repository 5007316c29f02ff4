"""The documentation as tests see it: fenced blocks, inline code, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^ *```")


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:50]}"

    @property
    def commands(self) -> list[str]:
        """The lines of a shell, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [" ".join(shlex.split(line, comments=True)) for line in lines]
        return [line for line in found if line]


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for indent, language, text in FENCE.findall(page.read_text()):
            text = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
            found.append(Block(page.name, language, text))
    return found


def inline_code() -> list[tuple[str, str]]:
    """(page, code) of everything between backticks outside of blocks, log entries left out."""
    found = []
    for page in PAGES:
        if page.name != "log.md":  # which tells of the past
            text = FENCE.sub("", page.read_text())
            found += [(page.name, " ".join(c.split())) for c in re.findall(r"`([^`]+)`", text)]
    return found


def links() -> list[tuple[Path, str]]:
    found = []
    for page in PAGES:
        found += [(page, target) for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    return [(page, target) for page, target in found if "://" not in target]
