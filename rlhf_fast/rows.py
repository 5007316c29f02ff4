"""Rows of the user's files; every refusal names the file and the row.

A source is a .jsonl, .json, .csv or .parquet file, a directory written by `datasets.save_to_disk`
or of such files, the name of a Hugging Face dataset, or `module:function` that returns rows. Of a
directory or a dataset `name:split` takes a split, by default `train`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_fast import hub
from rlhf_fast.errors import UserError
from rlhf_fast.io import read_jsonl
from rlhf_fast.plugins import load_function, place_of

Record = TypeVar("Record")


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

    def lines(self) -> list[str]:
        """One for each reason."""
        return [
            f"{count} refused: {reason} (first: {self.examples[reason]})"
            for reason, count in self.refused.most_common()
        ]

    def __str__(self) -> str:
        kept = f"{self.num_kept} rows kept, {self.num_truncated} of them truncated"
        return "\n".join([kept, *self.lines()])


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How rows become records, in every command that reads some."""

    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    bad_rows: Literal["stop", "count"] = "stop"
    """A row that cannot be read stops the run, or is left out and counted."""

    def reading(self, report: RowReport | None = None) -> dict[str, Any]:
        """Options of the functions that load rows; `report` counts those left out."""
        counted = (report or RowReport()) if self.bad_rows == "count" else None
        return {"system_prompt": self.system_prompt, "report": counted}


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
