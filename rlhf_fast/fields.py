"""The fields of a row, by the names that data sets have; a refusal names the row and the field."""

from __future__ import annotations

import math
import re
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.io import SURROGATE
from rlhf_fast.types import Message

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")
PROMPT = ("prompt", "instruction")
RESPONSE = ("response", "completion", "output")
CONVERSATION = ("messages", "conversations")
OTHER_NAMES = "rename one, or name a module:function that returns the rows as they should be"


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


def last_turn(
    response: tuple[list[Message] | None, str], where: str
) -> tuple[list[Message] | None, str]:
    """Splits a transcript into the messages before the last turn and that turn."""
    messages, text = response
    if messages is not None or (turns := transcript(text)) is None:
        return response
    *messages, last = turns
    if last["role"] != "assistant":
        raise UserError(f"{where}: a transcript must end with the assistant's turn")
    return messages, last["content"]


def scores_of(value: Any, where: str) -> dict[str, float]:
    """A number, or numbers by name; null is a missing one."""
    named = value if isinstance(value, dict) else {"score": value}
    known = {name: number for name, number in named.items() if number is not None}
    if not known:
        raise UserError(f"{where}: a response needs at least one score, got {value!r:.80}")
    missing = dict.fromkeys(named.keys() - known.keys(), math.nan)
    return {name: number_of(known, where, name) for name in known} | missing


def margin_of(row: dict[str, Any], where: str) -> float:
    if row.get("margin") is not None:
        return number_of(row, where, "margin")
    names = ("score_chosen", "score_rejected")
    if all(row.get(name) is not None for name in names):
        chosen, rejected = (number_of(row, where, name) for name in names)
        return chosen - rejected
    return 0.0


def _from_sharegpt(message: Any) -> Any:
    """{"from", "value"} as {"role", "content"}; anything else as it is."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        role = message["from"]
        return {"role": SHAREGPT_ROLES.get(role, role), "content": message["value"]}
    return message
