"""The pairwise preference model: a language model that answers A or B."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.rewards.pairwise import Meeting
from rlhf_fast.types import Message

TEMPLATE = "[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"


def pair_prompt(messages: Sequence[Message], first: str, second: str) -> list[Message]:
    """The question put to the model.

    Turns are named by position, the first is the user's (arXiv 2405.07863, section 2.2, and its
    released training data); a system message joins the first turn.
    """
    turns = [m["content"] for m in messages if m["role"] != "system"]
    system = "\n".join(m["content"] for m in messages if m["role"] == "system")
    if system:
        turns[0] = f"{system}\n{turns[0]}"
    context = "\n"
    for index, turn in enumerate(turns):
        context += f"\n\n<turn> {'assistant' if index % 2 else 'user'}\n {turn}"
    content = TEMPLATE.format(context=f"{context}\n\n\n", first=first, second=second)
    return [{"role": "user", "content": content}]


class PairModel:
    """Probability that response A is better: softmax over the logits of the tokens A and B."""

    def __init__(self, model: LanguageModel, chat: ChatFormat) -> None:
        self.model = model
        self.chat = chat
        self.answers = [[_one_token(chat, letter)] for letter in "AB"]

    def compare(self, meetings: Sequence[Meeting]) -> list[float]:
        groups = []
        for a, b in meetings:
            question = pair_prompt(a.prompt.messages, a.text, b.text)
            groups.append(TokenGroup(self.chat.prompt_ids(question), self.answers))
        return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in self.model.score_groups(groups)]


def _one_token(chat: ChatFormat, letter: str) -> int:
    ids = chat.tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == chat.tokenizer.unk_token_id:
        raise UserError(
            f"the pairwise model's tokenizer must have a token for {letter!r}, got {ids}: it was "
            f"not trained to answer A or B"
        )
    return ids[0]
