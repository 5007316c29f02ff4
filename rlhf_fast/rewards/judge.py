"""A language model behind an OpenAI-compatible endpoint as the judge."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.answers import Answers
from rlhf_fast.rewards.pairwise import Meeting
from rlhf_fast.types import Group, Message, Prompt, ScoredGroup

COMPARISON = """{criteria}

[Conversation]
{conversation}

[Response A]
{first}

[Response B]
{second}

Which response is better? {manner} End with exactly one of these verdicts: [[A]], [[B]], [[C]] \
(they are equally good)."""

RATING = """{criteria}

[Conversation]
{conversation}

[Response]
{response}

Rate the response from 1 (very bad) to 10 (excellent). {manner} End with the rating in double \
brackets, like [[5]]."""

ENTAILMENT = """{criteria}

[Conversation]
{conversation}

[Response]
{response}

[Principle]
{principle}

Does the response satisfy the principle? {manner} End with exactly one of these verdicts: [[YES]], \
[[NO]]."""

Value = TypeVar("Value")
ATTEMPTS = 3
"""Times that a question is asked until its answers all have a verdict."""
_BRIEF, _REASONED = "Answer with the verdict alone.", "Explain your reasons first, in a few words."


@dataclass(frozen=True)
class JudgeConfig:
    """A judge behind an OpenAI-compatible endpoint, or the policy."""

    url: str | None = None
    """Base address, e.g. http://127.0.0.1:8000/v1."""
    policy: bool = False
    """Instead of a server the policy itself is asked, with the weights that it has at the time
    (self-rewarding, arXiv 2401.10020)."""
    model: str = ""
    """Name of the model that the server knows."""
    mode: Literal["compare", "rate", "entail"] = "compare"
    """compare: pairs of responses, both orders (arXiv 2309.00267); rate: 1 to 10 each; entail: the
    share of the principles that a response satisfies, each asked for by itself (RLBFF, arXiv
    2509.21319)."""
    criteria: str = "You are a fair judge of how helpful, honest and harmless responses are."
    """What is judged; opens the request."""
    principles: tuple[str, ...] = ()
    """What a good response does, a sentence each. compare and rate show the judge all of them
    (SALMON, arXiv 2310.05910)."""
    principles_column: str | None = None
    """Field of a prompt's row with a list of further principles for its responses."""
    reasons: bool = False
    """Let the judge explain itself before the verdict."""
    samples: int = 1
    """Verdicts per request, averaged; above 1 they are drawn at temperature 1."""
    max_tokens: int = 512
    """Length of the judge's answer."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, if the server wants one."""
    concurrency: int = 32
    """Requests under way at a time."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"judge.{name} must be >= 1, got {getattr(self, name)}")
        of_servers = (self.url, self.model, self.api_key_env)
        if self.policy and any(of_servers):
            raise UserError(
                f"judge.policy asks no server: leave out judge.url, model and api_key_env, got "
                f"{', '.join(filter(None, of_servers))}"
            )

    @property
    def is_given(self) -> bool:
        return bool(self.url or self.policy)


class LLMJudge:
    """Asks the judge, again where an answer has no verdict; in the end that is an error that quotes
    it, never a guess.

    The same question is asked once; with `answers`, a file, once by all runs that share it, at
    whatever address the judge then is.
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        seed: int = 0,
        endpoint: Endpoint | None = None,
        answers: Path | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.endpoint = endpoint or Endpoint(
            config.url or "", api_key_env=config.api_key_env, concurrency=config.concurrency
        )
        self.answers = Answers(answers)

    def compare(self, meetings: Sequence[Meeting]) -> list[float]:
        """Probability that the first response is better; an even verdict counts one half."""
        questions = [
            COMPARISON.format(
                criteria=self._criteria(a.prompt),
                conversation=render(a.prompt.messages),
                first=a.text,
                second=b.text,
                manner=self._manner(),
            )
            for a, b in meetings
        ]
        value = {"A": 1.0, "B": 0.0, "C": 0.5}
        return self._ask(questions, re.compile(r"\[\[([ABC])\]\]"), value.__getitem__)

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Mean rating of each response, 1 to 10 (direct scores, arXiv 2309.00267), or the share of
        the principles that it satisfies."""
        if self.config.mode == "entail":
            return self._entailed(groups)
        questions = [
            RATING.format(
                criteria=self._criteria(c.prompt),
                conversation=render(c.prompt.messages),
                response=c.text,
                manner=self._manner(),
            )
            for group in groups
            for c in group
        ]
        ratings = iter(self._ask(questions, re.compile(r"\[\[(10|[1-9])\]\]"), float))
        return [ScoredGroup(g[0].prompt, list(g), [next(ratings) for _ in g]) for g in groups]

    def _entailed(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        questions = [
            ENTAILMENT.format(
                criteria=self.config.criteria,
                conversation=render(c.prompt.messages),
                response=c.text,
                principle=principle,
                manner=self._manner(),
            )
            for group in groups
            for principle in principles_of(group[0].prompt, self.config)
            for c in group
        ]
        value = {"YES": 1.0, "NO": 0.0}
        verdicts = iter(self._ask(questions, re.compile(r"\[\[(YES|NO)\]\]"), value.__getitem__))
        result = []
        for group in groups:
            count = len(principles_of(group[0].prompt, self.config))
            parts = {f"principle_{k}": [next(verdicts) for _ in group] for k in range(1, count + 1)}
            rewards = [statistics.fmean(values) for values in zip(*parts.values())]
            result.append(ScoredGroup(group[0].prompt, list(group), rewards, parts))
        return result

    def _criteria(self, prompt: Prompt) -> str:
        principles = principles_of(prompt, self.config)
        shown = "\n".join(f"- {principle}" for principle in principles)
        return f"{self.config.criteria}\n\nPrinciples:\n{shown}" if shown else self.config.criteria

    def _manner(self) -> str:
        return _REASONED if self.config.reasons else _BRIEF

    def _ask(self, questions: Sequence[str], verdict: re.Pattern, value: Any) -> list[float]:
        values = {q: self.answers.get(self._known_by(q)) for q in questions}
        silent: list[str] = []

        def read(question: str, texts: list[str]) -> float | None:
            verdicts = [verdict.findall(text) for text in texts]
            if not all(verdicts):
                silent.extend(t for t, found in zip(texts, verdicts) if not found)
                return None
            mean = statistics.fmean(value(v[-1]) for v in verdicts)
            self.answers.add(self._known_by(question), mean, texts)
            return mean

        for attempt in range(ATTEMPTS):
            left = [question for question, found in values.items() if found is None]
            values |= zip(left, self._answered(left, attempt, read))
        if None in values.values():
            raise UserError(
                f"the judge {self.config.model or 'policy'!r} gave no verdict like "
                f"{verdict.pattern} in {ATTEMPTS} attempts, got {silent[-1][-200:]!r}; raise "
                f"judge.max_tokens or take another judge"
            )
        return [values[question] for question in questions]

    def _answered(
        self, questions: Sequence[str], attempt: int, read: Callable[..., Value]
    ) -> list[Value]:
        """`read(question, texts)` of each, as its answer comes."""

        def ask(question: str) -> Value:
            answer = self.endpoint.post("chat/completions", self._body(question, attempt))
            return read(question, self._texts(answer))

        return self.endpoint.map(ask, questions)

    def _body(self, question: str, attempt: int) -> dict[str, Any]:
        """The first answer is the likeliest; others are drawn, so that they differ from it."""
        config = self.config
        return {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": config.max_tokens,
            "temperature": 0.0 if config.samples == 1 and attempt == 0 else 1.0,
            "n": config.samples,
            "seed": self.seed + attempt,
        }

    def _known_by(self, question: str) -> dict[str, Any]:
        """What decides an answer; with a verdict it is one whatever room it was given."""
        body = self._body(question, 0)
        del body["max_tokens"]
        return body

    def _texts(self, answer: dict[str, Any]) -> list[str]:
        try:
            texts = [choice["message"]["content"] or "" for choice in answer["choices"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.endpoint.url}: the answer lacks {error}; got {str(answer)[:200]}"
            ) from error
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{self.endpoint.url}: the content of an answer must be text, got {texts!r:.200}"
            )
        if len(texts) != self.config.samples:
            raise UserError(
                f"{self.endpoint.url}: judge.samples {self.config.samples} asks for as many "
                f"answers, got {len(texts)}; a server that does not know `n` takes judge.samples 1"
            )
        return texts


def principles_of(prompt: Prompt, config: JudgeConfig) -> list[str]:
    """The configuration's principles and those of the prompt's row; entail needs one at least."""
    own = prompt.metadata.get(config.principles_column or "", [])
    if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
        raise UserError(
            f"judge.principles_column: field {config.principles_column!r} of prompt {prompt.id!r} "
            f"must be a list of sentences, got {own!r:.80}"
        )
    if config.mode == "entail" and not (config.principles or own):
        raise UserError(
            f"judge.mode entail needs judge.principles, or judge.principles_column, got none for "
            f"prompt {prompt.id!r}"
        )
    return [*config.principles, *own]


def render(messages: Sequence[Message]) -> str:
    """A conversation as text, one `role: content` per turn."""
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
