"""Pairwise preference models: a language model that answers `A` or `B`, asked in both orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.types import Message


@dataclass(frozen=True)
class Comparison:
    """Two responses to one conversation."""

    messages: list[Message]
    first: str
    second: str


class PairwiseFormat:
    """Writes a comparison as a user's message; the answer is one token.

    The frame `[CONTEXT] [RESPONSE A] [RESPONSE B]` is that of arXiv 2405.07863.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.answer_ids = [self._answer_id(letter) for letter in "AB"]

    def prompt_ids(self, messages: list[Message], response_a: str, response_b: str) -> list[int]:
        context = "".join(f"<turn> {m['role']}\n{m['content']}\n\n" for m in messages)
        text = f"[CONTEXT] {context}[RESPONSE A] {response_a} [RESPONSE B] {response_b} \n"
        return self.chat.prompt_ids([{"role": "user", "content": text}])

    def training_groups(self, comparison: Comparison) -> list[TokenGroup]:
        """Both orders of a comparison whose first response is the better one."""
        c = comparison
        return [
            TokenGroup(self.prompt_ids(c.messages, c.first, c.second), [[self.answer_ids[0]]]),
            TokenGroup(self.prompt_ids(c.messages, c.second, c.first), [[self.answer_ids[1]]]),
        ]

    def _answer_id(self, letter: str) -> int:
        ids = self.chat.tokenizer.encode(letter, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.chat.tokenizer.unk_token_id:
            raise UserError(
                f"a pairwise model needs {letter!r} as one token, the tokenizer gives {ids}"
            )
        return ids[0]


def preference_probabilities(
    model: LanguageModel, form: PairwiseFormat, comparisons: Sequence[Comparison]
) -> list[float]:
    """Probability that the first response is the better one, the mean over both orders.

    In each order it is the softmax over the logits of `A` and `B` alone; the mean removes what the
    model prefers about a place.
    """
    answers = [[letter] for letter in form.answer_ids]
    groups = []
    for c in comparisons:
        groups.append(TokenGroup(form.prompt_ids(c.messages, c.first, c.second), answers))
        groups.append(TokenGroup(form.prompt_ids(c.messages, c.second, c.first), answers))
    logps = model.score_groups(groups)
    is_a = [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in logps]
    return [(p + 1 - q) / 2 for p, q in zip(is_a[::2], is_a[1::2])]
