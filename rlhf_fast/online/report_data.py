"""What the report reads from a run folder, checked line by line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.errors import UserError
from rlhf_fast.online.report_metrics import KNOWN

Row = dict[str, Any]


@dataclass(frozen=True)
class Response:
    """One held-out response with its score, the judge's where there is one."""

    text: str
    finished: bool
    reward: float | None
    num_tokens: int | None = None


@dataclass(frozen=True)
class EvaluatedPrompt:
    """A held-out prompt with the responses of one iteration's policy."""

    id: str
    messages: list[dict[str, str]]
    responses: list[Response]

    @property
    def mean_reward(self) -> float | None:
        rewards = [r.reward for r in self.responses]
        return sum(rewards) / len(rewards) if rewards and None not in rewards else None

    @property
    def typical(self) -> Response:
        """The response whose score is nearest to the prompt's mean; the first if unscored."""
        mean = self.mean_reward
        if mean is None:
            return self.responses[0]
        return min(self.responses, key=lambda r: abs(r.reward - mean))


@dataclass(frozen=True)
class Run:
    """Everything a report shows, as read from the folder."""

    name: str
    rows: list[Row]
    """One per evaluated iteration, in ascending order."""
    config_text: str = ""
    planned_iterations: int | None = None
    manifest: Row = field(default_factory=dict)
    training: dict[str, list[Row]] = field(default_factory=dict)
    """Optimiser steps by stage: "sft", then "iteration_1" and so on, in order."""
    evaluations: dict[int, list[EvaluatedPrompt]] = field(default_factory=dict)
    """Of the first and the last evaluated iteration only."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of one metric where it is present and finite."""
        found = [(r["iteration"], r[key]) for r in self.rows if is_finite(r.get(key))]
        return [x for x, _ in found], [float(y) for _, y in found]

    @property
    def score_name(self) -> str:
        """What the held-out responses' scores are: the judge's, or those that training sees."""
        return "gold" if self.series("gold")[0] else "reward"

    def other_keys(self) -> list[str]:
        """Numeric keys the report has no name for, sorted."""
        keys = {key for row in self.rows for key, value in row.items() if is_number(value)}
        return sorted(keys - KNOWN - {"iteration"})


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    # A JSON integer may exceed the range of a float, where math.isfinite raises.
    return is_number(value) and abs(value) < 1e300 and math.isfinite(value)


def read_run(run_dir: str | Path) -> Run:
    """Reads a run folder, finished or not; only metrics.jsonl must be there."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder; give the folder a run wrote to")
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(
            f"{metrics} does not exist; give a folder whose run has evaluated at least the model "
            f"that it starts from"
        )
    config_text, planned = _read_config(folder / "config.yaml")
    stages = ["sft", *(f"iteration_{k}" for k in _iterations(folder, "training.jsonl"))]
    training = {s: _read_training(folder / s / "training.jsonl") for s in stages}
    evaluated = _iterations(folder, "evaluation.jsonl")
    return Run(
        name=folder.resolve().name,
        rows=_read_metrics(metrics),
        config_text=config_text,
        planned_iterations=planned,
        manifest=_read_manifest(folder / "manifest.json"),
        training={stage: rows for stage, rows in training.items() if rows},
        evaluations={
            k: _read_evaluation(folder / f"iteration_{k}" / "evaluation.jsonl")
            for k in sorted({*evaluated[:1], *evaluated[-1:]})
        },
    )


def _iterations(folder: Path, file: str) -> list[int]:
    names = (path.parent.name for path in folder.glob(f"iteration_*/{file}"))
    return sorted(int(n[10:]) for n in names if re.fullmatch(r"iteration_(0|[1-9][0-9]*)", n))


def _json_lines(path: Path, *, growing: bool = False) -> Iterator[tuple[str, Row]]:
    """Yields ("file:line", object); `growing` passes over a half-written last line."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            if growing and number == len(lines):
                return
            raise UserError(
                f"{where} is not valid JSON ({error}); mend or delete this line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where} must be a JSON object, got {type(row).__name__}; mend or delete this line"
            )
        yield where, row


def _read_metrics(path: Path) -> list[Row]:
    rows: dict[int, Row] = {}
    for where, row in _json_lines(path):
        iteration = row.get("iteration")
        if iteration is None:
            iteration = max(rows, default=-1) + 1
        if not is_finite(iteration) or iteration < 0 or iteration != int(iteration):
            raise UserError(
                f"{where}: iteration must be an integer >= 0, got {iteration!r}; mend this line"
            )
        for key in KNOWN & row.keys():
            if row[key] is not None and not is_number(row[key]):
                raise UserError(
                    f"{where}: {key} must be a number or null, got {row[key]!r}; mend this line"
                )
        # A resumed run evaluates an iteration again: its last row is the valid one.
        rows[int(iteration)] = {**row, "iteration": int(iteration)}
    return [rows[k] for k in sorted(rows)]


def _read_training(path: Path) -> list[Row]:
    return [row for _, row in _json_lines(path, growing=True)] if path.is_file() else []


def _read_evaluation(path: Path) -> list[EvaluatedPrompt]:
    prompts = []
    for where, row in _json_lines(path, growing=True):
        try:
            texts = [_text(completion) for completion in row["completions"]]
            rewards = row.get("rewards") or [None] * len(texts)
            if len(rewards) != len(texts):
                raise ValueError(f"{len(rewards)} rewards for {len(texts)} completions")
            scores = [float(r) if is_finite(r) else None for r in rewards]
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])}
                for m in row["prompt"]["messages"]
            ]
            responses = [Response(t, f, s, n) for (t, f, n), s in zip(texts, scores)]
            if messages and responses:
                prompts.append(EvaluatedPrompt(str(row["prompt"]["id"]), messages, responses))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where} must hold prompt {{id, messages}}, completions [{{text}}] and "
                f"one reward per completion, got a row with {type(error).__name__}: {error}; "
                "evaluate this iteration again"
            ) from None
    return prompts


def _text(completion: Row) -> tuple[str, bool, int | None]:
    """Text, whether it ended by itself, and its length in tokens where it is known."""
    ids = completion.get("token_ids")
    num_tokens = len(ids) if isinstance(ids, list) else None
    return str(completion["text"]), bool(completion.get("finished", True)), num_tokens


def _read_manifest(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend or delete it") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} must be a JSON object; mend or delete it")
    return manifest


def _read_config(path: Path) -> tuple[str, int | None]:
    if not path.is_file():
        return "", None
    try:
        text = path.read_bytes().decode()
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where} is not valid YAML; mend or delete it") from None
    return text, _find_planned(config)


def _find_planned(config: Any) -> int | None:
    """The first `num_iterations` at any depth of the configuration."""
    if not isinstance(config, dict):
        return None
    if isinstance(config.get("num_iterations"), int):
        return config["num_iterations"]
    found = (_find_planned(value) for value in config.values())
    return next((f for f in found if f is not None), None)
