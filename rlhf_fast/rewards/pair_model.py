"""The pairwise preference model as a comparer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.pairwise import PairwiseFormat
from rlhf_fast.rewards.pairwise import Meeting
from rlhf_fast.rewards.scorer import finite


class PairModel:
    """Probability that response A is better: softmax over the logits of the tokens A and B."""

    def __init__(self, model: LanguageModel, chat: ChatFormat) -> None:
        self.model = model
        self.form = PairwiseFormat(chat)

    def compare(self, meetings: Sequence[Meeting]) -> list[float]:
        answers = [[letter] for letter in self.form.answer_ids]
        groups = [
            TokenGroup(self.form.prompt_ids(a.prompt.messages, a.text, b.text), answers)
            for a, b in meetings
        ]
        scores = self.model.score_groups(groups)
        for row, (first, _) in zip(scores, meetings):
            finite(row, "pairwise_model", first.prompt)
        return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in scores]
