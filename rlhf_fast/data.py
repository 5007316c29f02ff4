"""Reading the user's prompts, demonstrations and preference pairs.

A source is a .jsonl, .json, .csv or .parquet file, a directory written by `datasets.save_to_disk`,
the name of a Hugging Face dataset (`name` or `name:split`), or `module:function` returning rows.
Rows are plain or conversational; every refusal names the file, the row and the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.io import read_jsonl
from rlhf_fast.plugins import load_function
from rlhf_fast.types import Message, Prompt

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to imitate."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class TextPair:
    """A prompt with a preferred and a dispreferred response, as text."""

    prompt: Prompt
    chosen: str
    rejected: str


def load_prompts(source: str, *, system_prompt: str | None = None) -> list[Prompt]:
    """Reads prompts from field `prompt` (text or messages) or `messages`."""
    prompts = []
    for where, row in _rows(source):
        messages = _messages(row, where, ("prompt", "messages"))
        if messages[-1]["role"] == "assistant":
            raise UserError(f"{where}: a prompt must not end with an assistant message")
        prompts.append(_prompt(row, messages, len(prompts), system_prompt, ("prompt", "messages")))
    return _unique(prompts, source)


def load_demonstrations(source: str, *, system_prompt: str | None = None) -> list[Demonstration]:
    """Reads `prompt` with `response` or `completion`, or `messages` ending with the assistant."""
    result = []
    for where, row in _rows(source):
        if "messages" in row and "prompt" not in row:
            *messages, last = _messages(row, where, ("messages",))
            if last["role"] != "assistant" or not messages:
                raise UserError(
                    f"{where}: `messages` must be a prompt followed by an assistant message, "
                    f"got roles {[m['role'] for m in [*messages, last]]}"
                )
            response = last["content"]
        else:
            messages = _messages(row, where, ("prompt",))
            response = _text(row, where, ("response", "completion"))
        used = ("prompt", "messages", "response", "completion")
        prompt = _prompt(row, messages, len(result), system_prompt, used)
        result.append(Demonstration(prompt, response))
    _unique([r.prompt for r in result], source)
    return result


def load_preference_pairs(source: str, *, system_prompt: str | None = None) -> list[TextPair]:
    """Reads `prompt`, `chosen`, `rejected`; the responses may be whole conversations, or empty.

    Without `prompt`, the prompt is the part that both conversations share.
    """
    result = []
    for where, row in _rows(source):
        chosen, rejected = (_response(row, where, f) for f in ("chosen", "rejected"))
        if "prompt" in row:
            messages = _messages(row, where, ("prompt",))
        elif chosen[0] and chosen[0] == rejected[0]:
            messages = chosen[0]
        else:
            raise UserError(
                f"{where}: field `prompt` is missing and `chosen` and `rejected` are not "
                f"conversations with the same beginning; fields: {sorted(row)}"
            )
        if chosen[1] == rejected[1]:
            raise UserError(f"{where}: `chosen` and `rejected` are the same: {chosen[1][:60]!r}")
        used = ("prompt", "chosen", "rejected")
        prompt = _prompt(row, messages, len(result), system_prompt, used)
        result.append(TextPair(prompt, chosen[1], rejected[1]))
    _unique([r.prompt for r in result], source)
    return result


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
        return _load_dataset(path.suffix[1:], data_files=str(path), split="train")
    if path.is_dir():
        import datasets

        try:
            return datasets.load_from_disk(str(path))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{source}: not a saved dataset: {error}") from error
    if path.is_file():
        raise UserError(f"{source}: unknown kind of file; use .jsonl, .json, .csv or .parquet")
    if ":" in source and "/" not in source:
        return load_function(source)()
    if source.startswith((".", "/", "~")):
        raise UserError(f"no such file: {source}")
    name, _, split = source.partition(":")
    return _load_dataset(name, split=split or "train")


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of objects, got {type(rows).__name__}")
    return rows


def _load_dataset(name: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot load dataset {name!r} ({options}): {error}") from error


def _messages(row: dict[str, Any], where: str, fields: tuple[str, ...]) -> list[Message]:
    field = next((f for f in fields if f in row), None)
    if field is None:
        raise UserError(
            f"{where}: field `{'` or `'.join(fields)}` is missing; fields: {sorted(row)}"
        )
    value = row[field]
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{field}` must be text or a list of messages, got {value!r:.80}")
    for message in value:
        ok = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in ROLES:
            raise UserError(
                f"{where}: a message in `{field}` needs `role` (one of {', '.join(ROLES)}) and "
                f"`content` (text), got {message!r:.120}"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _text(
    row: dict[str, Any], where: str, fields: tuple[str, ...], *, may_be_empty: bool = False
) -> str:
    field = next((f for f in fields if f in row), None)
    if field is None:
        raise UserError(
            f"{where}: field `{'` or `'.join(fields)}` is missing; fields: {sorted(row)}"
        )
    value = row[field]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        kind = "text" if may_be_empty else "non-empty text"
        raise UserError(f"{where}: `{field}` must be {kind}, got {value!r:.80}")
    return value


def _response(row: dict[str, Any], where: str, field: str) -> tuple[list[Message] | None, str]:
    """Splits a response field into (the conversation before it, if given, and its text)."""
    if isinstance(row.get(field), list) and len(row[field]) > 1:
        *prompt, last = _messages(row, where, (field,))
        return prompt, last["content"]
    return None, _text(row, where, (field,), may_be_empty=True)


def _prompt(
    row: dict[str, Any],
    messages: list[Message],
    index: int,
    system_prompt: str | None,
    used: tuple[str, ...],
) -> Prompt:
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    metadata = {key: value for key, value in row.items() if key not in (*used, "id")}
    return Prompt(str(row.get("id", index)), messages, metadata)


def _unique(prompts: list[Prompt], source: str) -> list[Prompt]:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UserError(f"{source}: two rows have the id {prompt.id!r}")
        seen.add(prompt.id)
    return prompts
