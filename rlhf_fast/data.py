"""The user's prompts, demonstrations, conversations, preference pairs and scores as records.

Sources are described in `rlhf_fast/rows.py`, the names of fields in `rlhf_fast/fields.py`. Rows are
plain or conversational. A bad row is an error; a loader that is given a report counts it there and
goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.fields import (
    CONVERSATION,
    PROMPT,
    RESPONSE,
    first_of,
    last_turn,
    margin_of,
    messages_of,
    response_of,
    scores_of,
    shared_prompt,
    text_of,
)
from rlhf_fast.rows import RowReport, parse_rows
from rlhf_fast.types import Message, Prompt


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to imitate."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Conversation:
    """Messages whose assistant turns are to be imitated, or plain text."""

    id: str
    messages: list[Message]
    text: str | None = None


@dataclass(frozen=True)
class TextPair:
    """A prompt with a preferred and a dispreferred response, as text."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    """By how much the chosen response is better, if the row says so."""
    finished: tuple[bool, bool] = (True, True)
    """Whether each response ended by itself."""
    target: float = 1.0
    """Probability that the chosen response is the better one."""


@dataclass(frozen=True)
class LabelledTexts:
    """A prompt with responses, each desirable or not."""

    prompt: Prompt
    responses: list[str]
    labels: list[bool]
    """True where a response is desirable."""


@dataclass(frozen=True)
class ScoredTexts:
    """A prompt with responses and their scores by name; NaN where a score is missing."""

    prompt: Prompt
    responses: list[str]
    scores: list[dict[str, float]]
    finished: list[bool] | None = None
    """Whether each response ended by itself; None: all did."""


def load_prompts(
    source: str, *, system_prompt: str | None = None, report: RowReport | None = None
) -> list[Prompt]:
    """Reads prompts from field `prompt` (text or messages), `instruction` with `input`, `messages`,
    `conversations` or `turns`.

    Of several `turns` the first is the prompt; all of them stay in its metadata.
    """
    fields = ("prompt", *CONVERSATION, "instruction")

    def parse(row: dict[str, Any], where: str, index: int) -> Prompt:
        row = _with_first_turn(row)
        prompt = _prompt(row, where, messages_of(row, where, fields), index, system_prompt, fields)
        _check_json(prompt.metadata, where)
        return prompt

    return _unique(parse_rows(source, parse, report), source)


def load_demonstrations(
    source: str, *, system_prompt: str | None = None, report: RowReport | None = None
) -> list[Demonstration]:
    """Reads what `load_conversations` does, but plain text; the last message is the response."""

    def parse(row: dict[str, Any], where: str, index: int) -> Demonstration:
        return _demonstration(row, where, index, system_prompt)

    result = parse_rows(source, parse, report)
    _unique([r.prompt for r in result], source)
    return result


def load_conversations(
    source: str, *, system_prompt: str | None = None, report: RowReport | None = None
) -> list[Conversation]:
    """Reads `messages` or `conversations`; `prompt` with `response` or `completion`; `instruction`
    with `input` and `output`; or `text`.
    """

    def parse(row: dict[str, Any], where: str, index: int) -> Conversation:
        name = _name(row, index)
        if "text" in row and not {*CONVERSATION, *PROMPT} & row.keys():
            return Conversation(name, [], text_of(row, where, ("text",)))
        messages = _conversation(row, where)
        roles = [m["role"] for m in messages]
        if "assistant" not in roles[1:]:
            raise UserError(
                f"{where}: a conversation must have an assistant message after another, got {roles}"
            )
        return Conversation(name, _with_system(messages, system_prompt))

    return parse_rows(source, parse, report)


def load_preference_pairs(
    source: str, *, system_prompt: str | None = None, report: RowReport | None = None
) -> list[TextPair]:
    """Reads `prompt`, `chosen`, `rejected`; the responses may be whole conversations, or empty.

    Without `prompt`, both are conversations, as messages or as transcripts (`Human: ...`, empty
    line, `Assistant: ...`); the prompt is all but the last turn, and both must share it. With both,
    it contains `prompt`. The margin is `margin`, or `score_chosen` - `score_rejected`.
    """

    def parse(row: dict[str, Any], where: str, index: int) -> TextPair:
        return _pair(row, where, index, system_prompt)

    result = parse_rows(source, parse, report)
    _unique([r.prompt for r in result], source)
    return result


def load_labelled_texts(
    source: str, *, system_prompt: str | None = None, report: RowReport | None = None
) -> list[LabelledTexts]:
    """Reads what `load_demonstrations` does with `label`, true where the response is desirable; or
    what `load_preference_pairs` does, a desirable response and one that is not.
    """

    def parse(row: dict[str, Any], where: str, index: int) -> LabelledTexts:
        if "label" not in row and {"chosen", "rejected"} <= row.keys():
            pair = _pair(row, where, index, system_prompt)
            return LabelledTexts(pair.prompt, [pair.chosen, pair.rejected], [True, False])
        label = row[first_of(row, where, ("label",))]
        if not isinstance(label, bool):
            raise UserError(f"{where}: `label` must be true or false, got {label!r:.80}")
        single = _demonstration(row, where, index, system_prompt)
        return LabelledTexts(single.prompt, [single.response], [label])

    return parse_rows(source, parse, report)


def load_scored_texts(
    source: str, *, system_prompt: str | None = None, report: RowReport | None = None
) -> list[ScoredTexts]:
    """Reads `prompt`, `response` and `score` or `scores` ({name: number or null}).

    Or `prompt`, `responses` and `scores`, one number or one mapping for each response.
    """
    used = (*PROMPT, *RESPONSE, "responses", "score", "scores")

    def parse(row: dict[str, Any], where: str, index: int) -> ScoredTexts:
        messages = messages_of(row, where, PROMPT)
        if "responses" in row:
            responses, scores = row["responses"], row.get("scores")
            lists = isinstance(responses, list) and isinstance(scores, list) and responses
            if not lists or len(responses) != len(scores):
                raise UserError(
                    f"{where}: `responses` and `scores` must be lists of the same length, "
                    f"got {responses!r:.60} and {scores!r:.60}"
                )
        else:
            responses = [row[first_of(row, where, (*RESPONSE, "responses"))]]
            scores = [row[first_of(row, where, ("score", "scores"))]]
        texts = [text_of({"response": text}, where, ("response",)) for text in responses]
        prompt = _prompt(row, where, messages, index, system_prompt, used)
        return ScoredTexts(prompt, texts, [scores_of(value, where) for value in scores])

    return parse_rows(source, parse, report)


def _demonstration(
    row: dict[str, Any], where: str, index: int, system_prompt: str | None
) -> Demonstration:
    *messages, last = _conversation(row, where)
    if last["role"] != "assistant" or not messages:
        raise UserError(
            f"{where}: `messages` must be a prompt followed by an assistant message, "
            f"got roles {[m['role'] for m in [*messages, last]]}"
        )
    response = text_of({"response": last["content"]}, where, ("response",))
    used = (*PROMPT, *RESPONSE, *CONVERSATION)
    return Demonstration(_prompt(row, where, messages, index, system_prompt, used), response)


def _pair(row: dict[str, Any], where: str, index: int, system_prompt: str | None) -> TextPair:
    chosen, rejected = (response_of(row, where, f) for f in ("chosen", "rejected"))
    if not row.keys() & set(PROMPT):
        chosen, rejected = (last_turn(pair, where) for pair in (chosen, rejected))
    messages = shared_prompt(row, where, chosen[0], rejected[0])
    if chosen[1] == rejected[1]:
        raise UserError(f"{where}: `chosen` and `rejected` are the same: {chosen[1][:60]!r}")
    used = (*PROMPT, "chosen", "rejected")
    prompt = _prompt(row, where, messages, index, system_prompt, used)
    return TextPair(prompt, chosen[1], rejected[1], margin_of(row, where))


def _conversation(row: dict[str, Any], where: str) -> list[Message]:
    """A prompt with its response, or messages; beside these a prompt alone is a repetition."""
    response = next((name for name in RESPONSE if name in row), None)
    if response is None and set(CONVERSATION) & row.keys() or not set(PROMPT) & row.keys():
        return messages_of(row, where, CONVERSATION)
    messages = messages_of(row, where, PROMPT)
    before, text = response_of(row, where, response or first_of(row, where, RESPONSE))
    return [*messages, *(before or []), {"role": "assistant", "content": text}]


def _with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if system_prompt is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *messages]
    return messages


def _prompt(
    row: dict[str, Any],
    where: str,
    messages: list[Message],
    index: int,
    system_prompt: str | None,
    used: tuple[str, ...],
) -> Prompt:
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: a prompt must not end with an assistant message; leave the answer out"
        )
    messages = _with_system(messages, system_prompt)
    metadata = {key: value for key, value in row.items() if key not in (*used, "id")}
    return Prompt(_name(row, index), messages, metadata)


def _name(row: dict[str, Any], index: int) -> str:
    """The row's id, or else its place."""
    return str(index if row.get("id") is None else row["id"])


def _check_json(metadata: dict[str, Any], where: str) -> None:
    """The run's files hold a prompt with its metadata, so both must be JSON."""
    for name, value in metadata.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: field `{name}` must be JSON, got {type(value).__name__} ({error}); "
                f"leave the field out, or convert it in a module:function that returns the rows"
            ) from None


def _with_first_turn(row: dict[str, Any]) -> dict[str, Any]:
    """Questions of several turns, as MT-Bench (text) and Arena-Hard (dictionaries) have them."""
    turns = row.get("turns")
    if "prompt" in row or not isinstance(turns, list) or not turns:
        return row
    first = turns[0]
    return {**row, "prompt": first.get("content") if isinstance(first, dict) else first}


def _unique(prompts: list[Prompt], source: str) -> list[Prompt]:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UserError(f"{source}: two rows have the id {prompt.id!r}")
        seen.add(prompt.id)
    return prompts
