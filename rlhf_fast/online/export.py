"""A run's data in the formats of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.io import read_records, write_atomic, write_directory_atomic, write_jsonl
from rlhf_fast.types import (
    Completion,
    PreferencePair,
    ScoredGroup,
    preference_pair_from_json,
    scored_group_from_json,
)


def preference_rows(pairs: Iterable[PreferencePair]) -> list[dict[str, Any]]:
    """Conversational preference rows with explicit prompt, as TRL reads them."""
    return [
        {
            "prompt": pair.chosen.prompt.messages,
            "chosen": [_message(pair.chosen)],
            "rejected": [_message(pair.rejected)],
            "score_chosen": pair.chosen_reward,
            "score_rejected": pair.rejected_reward,
        }
        for pair in pairs
    ]


def completion_rows(scored: Iterable[ScoredGroup]) -> list[dict[str, Any]]:
    """One row per response: prompt, completion, reward."""
    return [
        {"prompt": group.prompt.messages, "completion": [_message(c)], "reward": reward}
        for group in scored
        for c, reward in zip(group.completions, group.rewards)
    ]


def export_preference(run: Path, output: Path, iteration: int | None) -> str:
    """The pairs of an iteration, or of all, as a dataset folder for `datasets.load_from_disk`."""
    pairs = _read(run, "pairs", iteration, preference_pair_from_json)
    return _save_dataset(output, preference_rows(pairs))


def export_completions(run: Path, output: Path, iteration: int | None) -> str:
    """The scored responses of an iteration, or of all, as a dataset folder."""
    scored = _read(run, "scored", iteration, scored_group_from_json)
    return _save_dataset(output, completion_rows(scored))


def export_alpaca_eval(run: Path, output: Path, iteration: int | None) -> str:
    """The first held-out response to each prompt as AlpacaEval's model outputs (.json)."""
    name, scored = _evaluation(run, iteration)
    rows = [
        {
            "instruction": group.prompt.messages[-1]["content"],
            "output": group.completions[0].text,
            "generator": name,
        }
        for group in scored
    ]
    write_atomic(output, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    return f"{output}: {len(rows)} outputs of {name}"


def export_arena_hard(run: Path, output: Path, iteration: int | None) -> str:
    """The first held-out response to each prompt as Arena-Hard's model answers (.jsonl)."""
    name, scored = _evaluation(run, iteration)
    rows = [
        {
            "uid": group.prompt.id,
            "ans_id": f"{name}-{group.prompt.id}",
            "model": name,
            "messages": [
                *group.prompt.messages,
                {"role": "assistant", "content": {"answer": group.completions[0].text}},
            ],
        }
        for group in scored
    ]
    write_jsonl(output, rows)
    return f"{output}: {len(rows)} answers of {name}"


FORMATS: dict[str, Callable[[Path, Path, int | None], str]] = {
    "preference": export_preference,
    "completions": export_completions,
    "alpaca_eval": export_alpaca_eval,
    "arena_hard": export_arena_hard,
}


def _message(completion: Completion) -> dict[str, str]:
    return {"role": "assistant", "content": completion.text}


def _read(run: Path, name: str, iteration: int | None, from_json: Callable) -> list:
    pattern = f"iteration_{'*' if iteration is None else iteration}/{name}.jsonl"
    files = sorted(run.glob(pattern), key=lambda p: int(p.parent.name.split("_")[1]))
    if not files:
        raise UserError(f"{run} has no {pattern}")
    return [record for file in files for record in read_records(file, from_json)]


def _evaluation(run: Path, iteration: int | None) -> tuple[str, list[ScoredGroup]]:
    numbers = [int(p.parent.name.split("_")[1]) for p in run.glob("iteration_*/evaluation.jsonl")]
    if not numbers or (iteration is not None and iteration not in numbers):
        raise UserError(f"{run} has no evaluation of iteration {iteration or 0}")
    chosen = max(numbers) if iteration is None else iteration
    scored = _read(run, "evaluation", chosen, scored_group_from_json)
    return f"{run.resolve().name}-iteration-{chosen}", scored


def _save_dataset(output: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    if output.exists():
        raise UserError(f"output {output} exists: remove it or choose another --output")
    dataset = datasets.Dataset.from_list(rows)
    write_directory_atomic(output, lambda path: dataset.save_to_disk(str(path)))
    return f"{output}: {len(rows)} rows, for datasets.load_from_disk"
