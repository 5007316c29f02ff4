"""The policy as its own judge: self-rewarding language models, arXiv 2401.10020."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rlhf_fast.rewards.answers import Answers
from rlhf_fast.rewards.judge import JudgeConfig, LLMJudge, Value


class AnswersOfPolicy(Protocol):
    """The present policy's answers to questions, `count` texts each."""

    def __call__(
        self,
        questions: Sequence[str],
        *,
        count: int,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> list[list[str]]: ...


class PolicyJudge(LLMJudge):
    """The policy as its own judge; what it once answered is asked again, for it has changed."""

    def __init__(self, config: JudgeConfig, ask: AnswersOfPolicy, *, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.ask = ask

    def _ask(self, questions: Sequence[str], verdict: re.Pattern, value: Any) -> list[float]:
        self.answers = Answers()
        return super()._ask(questions, verdict, value)

    def _answered(
        self, questions: Sequence[str], attempt: int, read: Callable[..., Value]
    ) -> list[Value]:
        if not questions:
            return []
        body = self._body("", attempt)
        names = {"count": "n", "temperature": "temperature", "max_tokens": "max_tokens"}
        options = {name: body[key] for name, key in names.items()}
        return list(map(read, questions, self.ask(questions, seed=body["seed"], **options)))
