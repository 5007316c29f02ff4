"""Rewards that rules give: right answers, formats, lengths, repetition."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from rlhf_fast.errors import UserError
from rlhf_fast.types import Completion, Group, Prompt, ScoredGroup

Kind = Literal["math", "number", "exact", "format", "overlong", "repetition"]
ANSWERS = ("math", "number", "exact")
"""Kinds that need the right answer from the prompt's row."""
SETTINGS = {
    **dict.fromkeys(ANSWERS, ("column", "answer")),
    "format": ("pattern",),
    "overlong": ("max_tokens", "buffer_tokens"),
    "repetition": ("ngram_words",),
}
THINKING = r"\s*<think>(?!.*<think>).*?</think>.*\S.*"
NUMBER = re.compile(
    r"(?<![\w./])[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?![\d.]*/\d)"
)
"""Neither part of a fraction is one."""
SECONDS = 5
"""What math-verify may take for one answer."""


@dataclass(frozen=True)
class RuleConfig:
    """A reward by a rule; several are combined as `reward.parts`."""

    kind: Kind | None = None
    """1 or 0: math, the answer equals the row's as mathematics does (package math-verify); number,
    as numbers do; exact, but for case and white space; format, the whole response matches
    `pattern`. 0 to -1: overlong, falls over the last `buffer_tokens` before `max_tokens` (DAPO,
    arXiv 2503.14476, equation 13); repetition, the share of n-grams of words that came before."""
    column: str = "answer"
    """Field of a prompt's row with the right answer, or a list of right ones."""
    answer: str | None = None
    """Regular expression of the response's answer, its last match counts, of which the first group,
    if there is one. None: what is in \\boxed{}, in <answer>, or behind ####; without those the last
    number, what math-verify finds, or for exact the whole response."""
    pattern: str = THINKING
    """Of format; `.` matches line ends too. The default is reasoning in <think>, then an answer."""
    max_tokens: int | None = None
    """Of overlong: longer responses get -1."""
    buffer_tokens: int = 0
    """Of overlong."""
    ngram_words: int = 3
    """Of repetition."""

    def __post_init__(self) -> None:
        for name in ("answer", "pattern"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise UserError(
                    f"rule.{name} must be a regular expression, got {getattr(self, name)!r}: "
                    f"{error}"
                ) from None
        for setting in fields(self)[1:]:
            value = getattr(self, setting.name)
            if self.kind and value != setting.default and setting.name not in SETTINGS[self.kind]:
                used = ", ".join(SETTINGS[self.kind])
                raise UserError(
                    f"rule: kind {self.kind} takes {used}, not {setting.name}, got {value!r}"
                )
        if self.kind == "overlong" and self.max_tokens is None:
            raise UserError("rule: kind overlong needs max_tokens, got none")
        if self.buffer_tokens < 0 or self.ngram_words < 1:
            raise UserError(
                f"rule: buffer_tokens must be >= 0 and ngram_words >= 1, got "
                f"{self.buffer_tokens} and {self.ngram_words}"
            )


class RuleScorer:
    """Scores every response by itself, with the rule and its prompt's row."""

    scores_alone = True

    def __init__(self, config: RuleConfig) -> None:
        self.rule = _RULES[config.kind]
        self.config = config

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        return [
            ScoredGroup(group[0].prompt, list(group), [self.rule(c, self.config) for c in group])
            for group in groups
        ]


def check_rows(config: RuleConfig, prompts: Iterable[Prompt]) -> None:
    """Refuses prompts without an answer where the rule needs one, and math without its package."""
    if config.kind not in ANSWERS:
        return
    if config.kind == "math":
        _math_verify()
    for prompt in prompts:
        answers = right_answers(prompt, config.column)
        if config.kind == "number":
            for answer in answers:
                if number_in(answer, alone=True) is None:
                    raise UserError(
                        f"rule number: field {config.column!r} of prompt {prompt.id!r} must hold "
                        f"one number, got {answer[:80]!r}; rule math knows other answers"
                    )


def right_answers(prompt: Prompt, column: str) -> list[str]:
    """The row's answer, or all of them."""
    value = prompt.metadata.get(column)
    answers = [str(answer) for answer in (value if isinstance(value, list) else [value])]
    if value is None or not answers:
        raise UserError(
            f"rule.column: prompt {prompt.id!r} has no field {column!r} with the right answer, got "
            f"{', '.join(prompt.metadata) or 'no other field than the prompt'}"
        )
    return answers


def marked_answer(text: str) -> str | None:
    """What the last \\boxed{} holds, else the last <answer>, else the line after ####."""
    if (start := text.rfind("\\boxed{")) >= 0:
        depth, begin = 0, start + len("\\boxed")
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin + 1 : place].strip()
    if found := re.findall(r"<answer>(.*?)</answer>", text, re.S):
        return found[-1].strip()
    rest = text.rpartition("####")[2].strip() if "####" in text else ""
    return rest.splitlines()[0].strip() if rest else None


def number_in(text: str, *, alone: bool = False) -> Decimal | None:
    """The only number of the marked answer, else the text's last; `$1,234.50` is 1234.5.

    With `alone` it must be the text's only one. Of several in an answer none is known to be it.
    """
    marked = marked_answer(text)
    found = NUMBER.findall(text if marked is None else marked)
    if not found or ((alone or marked is not None) and len(found) > 1):
        return None
    try:
        return Decimal(re.sub(r"[$,]", "", found[-1]))
    except InvalidOperation:  # an exponent of more than 18 digits
        return None


def distinct_ngrams(text: str, size: int) -> float:
    """Share of the n-grams of words that occur for the first time; 1 for a text without any."""
    words = text.split()
    ngrams = list(zip(*(words[i:] for i in range(size))))
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def _answer(completion: Completion, config: RuleConfig) -> str:
    """The part of the response that is looked at; empty where the pattern finds none."""
    if config.answer is None:
        return completion.text
    found = [*re.finditer(config.answer, completion.text, re.S)]
    return (found[-1][1 if found[-1].re.groups else 0] or "") if found else ""


def _matches(equal: Callable[[str, str], Any]) -> Callable[[Completion, RuleConfig], float]:
    def rule(completion: Completion, config: RuleConfig) -> float:
        given = _answer(completion, config)
        rights = right_answers(completion.prompt, config.column)
        return float(any(equal(right, given) for right in rights))

    return rule


def _equal_numbers(right: str, given: str) -> bool:
    return (number := number_in(given)) is not None and number == number_in(right, alone=True)


def _equal_texts(right: str, given: str) -> bool:
    first, second = (
        text if (marked := marked_answer(text)) is None else marked for text in (right, given)
    )
    return first.casefold().split() == second.casefold().split()


def _equal_mathematics(right: str, given: str) -> bool:
    if _equal_texts(right, given):
        return True
    library = _math_verify()
    # Its limit of time is an alarm, which only the main thread may set.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    marked = [marked_answer(text) for text in (right, given)]
    # Without dollars 2\\sqrt{3} would be read as 2.
    texts = [
        f"${(right if marked[0] is None else marked[0]).strip('$ ')}$",
        given if marked[1] is None else f"${marked[1].strip('$ ')}$",
    ]
    first, second = (library.parse(text, parsing_timeout=seconds) for text in texts)
    return bool(first and second) and library.verify(first, second, timeout_seconds=seconds)


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        raise UserError(
            "rule math needs the package math-verify: pip install 'rlhf-fast[math]'; rule number "
            "needs none"
        ) from None
    return math_verify


def _format(completion: Completion, config: RuleConfig) -> float:
    return float(re.fullmatch(config.pattern, completion.text, re.S) is not None)


def _overlong(completion: Completion, config: RuleConfig) -> float:
    """0 up to `max_tokens - buffer_tokens`, from there in a line to -1."""
    excess = len(completion.token_ids) - (config.max_tokens - config.buffer_tokens)
    if config.buffer_tokens == 0:
        return -float(excess > 0)
    return -min(1.0, max(0.0, excess / config.buffer_tokens))


def _repetition(completion: Completion, config: RuleConfig) -> float:
    return distinct_ngrams(completion.text, config.ngram_words) - 1.0


_RULES: dict[str | None, Callable[[Completion, RuleConfig], float]] = {
    "math": _matches(_equal_mathematics),
    "number": _matches(_equal_numbers),
    "exact": _matches(_equal_texts),
    "format": _format,
    "overlong": _overlong,
    "repetition": _repetition,
}
