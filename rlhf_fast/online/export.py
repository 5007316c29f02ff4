"""The data of a run, or of a file that a stage wrote, in the formats of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.errors import UserError
from rlhf_fast.io import read_records, write_atomic, write_directory_atomic, write_jsonl
from rlhf_fast.types import (
    Completion,
    PreferencePair,
    Prompt,
    ScoredGroup,
    group_from_json,
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


def export_preference(source: Path, output: Path, iteration: int | None) -> str:
    """The pairs of an iteration, or of all, as a dataset folder for `datasets.load_from_disk`."""
    pairs = _read(source, "pairs", iteration, preference_pair_from_json)
    return _save_dataset(output, preference_rows(pairs))


def export_completions(source: Path, output: Path, iteration: int | None) -> str:
    """The scored responses of an iteration, or of all, as a dataset folder."""
    scored = _read(source, "scored", iteration, scored_group_from_json)
    return _save_dataset(output, completion_rows(scored))


def export_alpaca_eval(source: Path, output: Path, iteration: int | None) -> str:
    """The first response to each prompt as AlpacaEval's model outputs (.json)."""
    name, firsts = _first_responses(source, iteration)
    rows = [
        {"instruction": _questions(c.prompt)[-1], "output": c.text, "generator": name}
        for c in firsts
    ]
    write_atomic(output, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    return f"{output}: {len(rows)} outputs of {name}"


def export_arena_hard(source: Path, output: Path, iteration: int | None) -> str:
    """The first response to each prompt as Arena-Hard's model answers (.jsonl)."""
    name, firsts = _first_responses(source, iteration)
    rows = [
        {
            "uid": c.prompt.metadata.get("uid", c.prompt.id),
            "ans_id": f"{name}-{c.prompt.id}",
            "model": name,
            "messages": [
                *c.prompt.messages,
                {"role": "assistant", "content": {"answer": c.text}},
            ],
        }
        for c in firsts
    ]
    write_jsonl(output, rows)
    return f"{output}: {len(rows)} answers of {name}"


def export_mt_bench(source: Path, output: Path, iteration: int | None) -> str:
    """Answers to questions of several turns as MT-Bench's model answers (.jsonl).

    They are what the sampler `multi_turn` makes of rows with `turns`; FastChat looks for them in
    `model_answer/MODEL.jsonl`.
    """
    name, firsts = _first_responses(source, iteration)
    last: dict[str, Completion] = {}  # of each question, the one with most turns before it
    for c in firsts:
        question = c.prompt.id.split("/turn-")[0]
        if question not in last or len(last[question].prompt.messages) < len(c.prompt.messages):
            last[question] = c
    rows = []
    for question, c in last.items():
        wanted, turns = c.prompt.metadata.get("turns", [""]), _answers(c)
        if len(turns) != len(wanted):
            raise UserError(
                f"{source}: question {question} has {len(turns)} of {len(wanted)} turns answered; "
                f"sample with --generation.sampler.kind multi_turn and "
                f"--generation.sampler.turns {len(wanted)}"
            )
        choices = [{"index": 0, "turns": turns}]
        number = c.prompt.metadata.get("question_id", question)
        answer = {"question_id": number, "answer_id": f"{name}-{question}", "model_id": name}
        rows.append({**answer, "choices": choices, "tstamp": source.stat().st_mtime})
    write_jsonl(output, rows)
    return f"{output}: {len(rows)} answers of {name}"


def export_lm_eval(source: Path, output: Path, iteration: int | None) -> str:
    """A configuration (.yaml) with which `lm-eval run --config` evaluates an iteration's model."""
    name, _ = _evaluation(source, iteration)
    model = source / name / "policy"
    if name == "iteration_0":
        model = source / "sft" / "model"
    if not model.is_dir():
        raise UserError(f"{source} has no model {model}: choose another --iteration")
    settings = {
        "model": "hf",
        "model_args": {"pretrained": str(model.resolve()), "dtype": "bfloat16"},
        "tasks": LM_EVAL_TASKS,
        "apply_chat_template": True,
    }
    write_atomic(output, yaml.safe_dump(settings, sort_keys=False))
    return f"{output}: for `lm-eval run --config {output}`, model {model}"


LM_EVAL_TASKS = ["gsm8k", "minerva_math", "mmlu", "arc_challenge", "truthfulqa_mc2", "ifeval"]
"""The capabilities that alignment may cost; tasks that run generated code are left to the user."""
FORMATS: dict[str, Callable[[Path, Path, int | None], str]] = {
    "preference": export_preference,
    "completions": export_completions,
    "alpaca_eval": export_alpaca_eval,
    "arena_hard": export_arena_hard,
    "mt_bench": export_mt_bench,
    "lm_eval": export_lm_eval,
}


def _message(completion: Completion) -> dict[str, str]:
    return {"role": "assistant", "content": completion.text}


def _questions(prompt: Prompt) -> list[str]:
    return [message["content"] for message in prompt.messages if message["role"] == "user"]


def _answers(completion: Completion) -> list[str]:
    """All turns of the assistant, the completion last."""
    before = [m["content"] for m in completion.prompt.messages if m["role"] == "assistant"]
    return [*before, completion.text]


def _read(source: Path, name: str, iteration: int | None, from_json: Callable) -> list:
    if source.is_file():
        return read_records(source, from_json)
    pattern = f"iteration_{'*' if iteration is None else iteration}/{name}.jsonl"
    files = sorted(source.glob(pattern), key=lambda p: int(p.parent.name.split("_")[1]))
    if not files:
        raise UserError(f"{source} has no {pattern}")
    return [record for file in files for record in read_records(file, from_json)]


def _first_responses(source: Path, iteration: int | None) -> tuple[str, list[Completion]]:
    """(name of the model, its first response to each prompt)."""
    if source.is_file():
        return source.stem, [group[0] for group in read_records(source, group_from_json)]
    name, scored = _evaluation(source, iteration)
    named = f"{source.resolve().name}-{name.replace('_', '-')}"
    return named, [group.completions[0] for group in scored]


def _evaluation(run: Path, iteration: int | None) -> tuple[str, list[ScoredGroup]]:
    """(folder of the iteration, its held-out responses)."""
    numbers = [int(p.parent.name.split("_")[1]) for p in run.glob("iteration_*/evaluation.jsonl")]
    if not numbers or (iteration is not None and iteration not in numbers):
        raise UserError(f"{run} has no evaluation of iteration {iteration or 0}")
    chosen = max(numbers) if iteration is None else iteration
    return f"iteration_{chosen}", _read(run, "evaluation", chosen, scored_group_from_json)


def _save_dataset(output: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    if output.exists():
        raise UserError(f"output {output} exists: remove it or choose another --output")
    dataset = datasets.Dataset.from_list(rows)
    write_directory_atomic(output, lambda path: dataset.save_to_disk(str(path)))
    return f"{output}: {len(rows)} rows, for datasets.load_from_disk"
