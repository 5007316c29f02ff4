"""Rows of the user's files, and their fields; every refusal names the file, the row, the field.

A source is a .jsonl, .json, .csv or .parquet file, a directory written by `datasets.save_to_disk`
or of such files, the name of a Hugging Face dataset, or `module:function` that returns rows. Of a
directory or a dataset `name:split` takes a split, by default `train`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast import hub
from rlhf_fast.errors import UserError
from rlhf_fast.io import SURROGATE, read_jsonl
from rlhf_fast.plugins import load_function, place_of
from rlhf_fast.types import Message

Record = TypeVar("Record")
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")
PROMPT = ("prompt", "instruction")
RESPONSE = ("response", "completion", "output")
CONVERSATION = ("messages", "conversations")
OTHER_NAMES = "rename one, or name a module:function that returns the rows as they should be"


@dataclass
class RowReport:
    """What became of the rows of a source; no row goes missing without a count and a reason."""

    num_kept: int = 0
    num_truncated: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Rows by the reason for which they are not used."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the full message about the first such row."""

    def refuse(self, where: str, reason: str, message: str = "") -> None:
        self.refused[reason] += 1
        self.examples.setdefault(reason, message or f"{where}: {reason}")

    def to_json(self) -> dict[str, Any]:
        return {
            "num_kept": self.num_kept,
            "num_truncated": self.num_truncated,
            "num_refused": sum(self.refused.values()),
            "refused": dict(self.refused),
            "examples": self.examples,
        }

    def __str__(self) -> str:
        lines = [f"{self.num_kept} rows kept, {self.num_truncated} of them truncated"]
        lines += [
            f"{count} refused: {reason} (first: {self.examples[reason]})"
            for reason, count in self.refused.most_common()
        ]
        return "\n".join(lines)


def parse_rows(
    source: str, parse: Callable[[dict[str, Any], str, int], Record], report: RowReport | None
) -> list[Record]:
    """Calls `parse(row, where, index)` on every row; with a report, bad rows are counted there."""
    result: list[Record] = []
    for where, row in read_rows(source):
        try:
            result.append(parse(row, where, len(result)))
        except UserError as error:
            if report is None:
                raise
            reason = str(error).removeprefix(f"{where}: ")
            for mark in ("; ", ", got ", ": "):
                reason = reason.partition(mark)[0]
            report.refuse(where, reason, str(error))
    if not result:
        raise UserError(f"{source}: no row can be used\n{report}")
    return result


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row); `where` is what an error about the row starts with."""
    path = Path(source)
    empty = True
    for number, row in enumerate(_read(source, path), 1):
        empty = False
        if not isinstance(row, dict):
            raise UserError(f"{source}, row {number}: must be an object, got {type(row).__name__}")
        yield f"{source}, row {number}", row
    if empty:
        raise UserError(f"{source}: has no rows")


def _read(source: str, path: Path) -> Any:
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix in (".parquet", ".csv"):
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        # Only an empty cell is missing: "None" and "NA" are words like others.
        cells = {"keep_default_na": False, "na_values": [""]} if path.suffix == ".csv" else {}
        return _load_dataset(path.suffix[1:], data_files=str(path), split="train", **cells)
    if path.is_file():
        raise UserError(f"{source}: unknown kind of file; use .jsonl, .json, .csv or .parquet")
    name, _, split = source.partition(":")
    if Path(name).is_dir():
        return _read_directory(name, split or "train")
    if split and "/" not in source:
        return _call(source)
    if hub.is_path(name):
        raise UserError(f"no such file: {source}")
    return _load_dataset(name, split=split or "train")


def _read_directory(name: str, split: str) -> Any:
    import datasets

    if not any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _load_dataset(name, split=split)
    try:
        saved = datasets.load_from_disk(name)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{name}: not a saved dataset: {error}") from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise UserError(f"{name}: has no split {split!r}; give {name}:SPLIT, of {sorted(saved)}")
    return saved[split]


def _call(name: str) -> Any:
    """What the user's function returns; it is asked for its rows here, so their errors show."""
    function = load_function(name)
    try:
        return list(function())
    except Exception as error:  # whatever the user's function raises is reported as theirs
        raise UserError(
            f"{name} must return rows, but raised {type(error).__name__}: {error}{place_of(error)}"
        ) from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except ValueError as error:
        lines = "; one object per line is .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path}: not valid JSON ({error}){lines}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of objects, got {type(rows).__name__}")
    return rows


def _load_dataset(name: str, **options: Any) -> Any:
    import datasets

    is_local = "data_files" in options or Path(name).is_dir()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if not is_local and not any(cache.glob(f"{name.replace('/', '___')}*")):
        hub.look_up("dataset", name, "data")
    try:
        return datasets.load_dataset(name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error)[:300]  # it may list every field of every file
        source = options.get("data_files", name)
        raise UserError(f"cannot load {source}, split {options['split']}: {reason}") from error


def first_of(row: dict[str, Any], where: str, fields: tuple[str, ...]) -> str:
    """The first of these fields that the row has."""
    for name in fields:
        if name in row:
            return name
    raise UserError(
        f"{where}: field `{'` or `'.join(fields)}` is missing; fields: {sorted(row)}; {OTHER_NAMES}"
    )


def messages_of(row: dict[str, Any], where: str, fields: tuple[str, ...]) -> list[Message]:
    field = first_of(row, where, fields)
    value = row[field]
    if field == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        value = f"{value}\n\n{row['input']}"  # as Alpaca's rows are meant
    if isinstance(value, str) and value.strip():
        *messages, last = transcript(value) or [None]
        if messages and last == {"role": "assistant", "content": ""}:
            return messages
        return [{"role": "user", "content": _whole(value, where, field)}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{field}` must be text or a list of messages, got {value!r:.80}")
    value = [_from_sharegpt(message) for message in value]
    for message in value:
        ok = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in ROLES:
            raise UserError(
                f"{where}: a message in `{field}` needs `role` (one of {', '.join(ROLES)}) and "
                f"`content` (text), got {message!r:.120}"
            )
        _whole(message["content"], where, field)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def text_of(
    row: dict[str, Any], where: str, fields: tuple[str, ...], *, may_be_empty: bool = False
) -> str:
    field = first_of(row, where, fields)
    value = row[field]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        kind = "text" if may_be_empty else "non-empty text"
        raise UserError(f"{where}: `{field}` must be {kind}, got {value!r:.80}")
    return _whole(value, where, field)


def _whole(text: str, where: str, field: str) -> str:
    """The text, unless a character is cut in two, which no tokenizer takes."""
    if half := SURROGATE.search(text):
        raise UserError(
            f"{where}: `{field}` holds half a character, {half[0]!r} at {half.start()}; "
            f"remove it from the text"
        )
    return text


def response_of(row: dict[str, Any], where: str, field: str) -> tuple[list[Message] | None, str]:
    """Splits a response field into (the conversation before it, if given, and its text)."""
    if isinstance(row.get(field), list) and len(row[field]) > 1:
        *prompt, last = messages_of(row, where, (field,))
        if last["role"] != "assistant":
            raise UserError(
                f"{where}: `{field}` must end with an assistant message, got role {last['role']}"
            )
        return prompt, last["content"]
    return None, text_of(row, where, (field,), may_be_empty=True)


def shared_prompt(
    row: dict[str, Any], where: str, chosen: list[Message] | None, rejected: list[Message] | None
) -> list[Message]:
    """What both responses answer: the conversation before them, or else `prompt`."""
    if chosen and rejected and chosen != rejected:
        raise UserError(f"{where}: `chosen` and `rejected` must have the same beginning")
    before = chosen or rejected
    if not row.keys() & set(PROMPT):
        if not (chosen and rejected):
            raise UserError(
                f"{where}: field `prompt` is missing and `chosen` and `rejected` are not "
                f"conversations with the same beginning; fields: {sorted(row)}"
            )
        return chosen
    prompt = messages_of(row, where, PROMPT)
    said = [message["content"].strip() for message in before or prompt]
    if prompt[-1]["content"].strip() not in said:
        raise UserError(
            f"{where}: the conversation of `chosen` and `rejected` must contain `prompt` before "
            f"the response, got {before[-1]['content']!r:.60}; leave one of them out"
        )
    return before if before and len(before) > len(prompt) else prompt


def transcript(text: str) -> list[Message] | None:
    """The turns of a text `Human: ...\\n\\nAssistant: ...`, as in Anthropic's HH; None for another.

    A turn begins after an empty line; white space around it is not part of it.
    """
    before, *parts = TURN.split(f"\n\n{text.lstrip()}")
    if before or not parts or parts[0] != "Human":
        return None
    return [
        {"role": SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[0::2], parts[1::2])
    ]


def number_of(row: dict[str, Any], where: str, name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: `{name}` must be a number, got {value!r:.80}")
    if not math.isfinite(value):
        raise UserError(f"{where}: `{name}` must be a finite number, got {value}")
    return float(value)


def _from_sharegpt(message: Any) -> Any:
    """{"from", "value"} as {"role", "content"}; anything else as it is."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        role = message["from"]
        return {"role": SHAREGPT_ROLES.get(role, role), "content": message["value"]}
    return message
