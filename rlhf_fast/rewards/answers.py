"""What a judge has answered, on disk: an answer that was paid for outlives the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.io import append_jsonl


class Answers:
    """Values of requests that were answered before; without a file, for as long as this lives.

    Each line of the file holds the SHA-256 of a request, the value of its answer and the answer's
    texts. It is written as the answer comes. A line that is broken, as a full disk or a power cut
    leaves it, counts for nothing. Several judges may share the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.values: dict[str, float] = {}
        if path and path.exists():
            self._read(path)

    def get(self, request: dict[str, Any]) -> float | None:
        return self.values.get(_name(request))

    def add(self, request: dict[str, Any], value: float, texts: list[str]) -> None:
        name = _name(request)
        if self.path:
            append_jsonl(self.path, {"request": name, "value": value, "answers": texts})
        self.values[name] = value

    def _read(self, path: Path) -> None:
        line = b"\n"
        try:
            with open(path, "r+b") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        continue
                    self.values[row["request"]] = row["value"]
                if not line.endswith(b"\n"):
                    file.write(b"\n")  # or the next answer would continue a broken line
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: must hold a judge's answers, got {line[:80]!r}; remove it"
            ) from error


def _name(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
