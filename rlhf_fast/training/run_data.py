"""Rows of the user's data as tokens, within the length limit, every row accounted for."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_fast.data import (
    load_conversations,
    load_labelled_texts,
    load_preference_pairs,
    load_scored_texts,
)
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.pairwise import Comparison, PairwiseFormat
from rlhf_fast.training.lengths import limit_length
from rlhf_fast.training.reward_regression import ScoredResponses
from rlhf_fast.training.session import Session


class RunData:
    """The rows of a run's data; `session.report` says what became of each."""

    def __init__(self, session: Session, chat: ChatFormat) -> None:
        self.session, self.chat, self.run = session, chat, session.run
        self._options = self.run.reading(session.report)

    def conversations(self, *, every_turn: bool) -> list[TokenGroup]:
        """What supervised fine-tuning learns: the assistant's turns, or plain text."""
        groups = []
        for row in load_conversations(self.run.data, **self._options):
            try:
                if row.text is None:
                    group = self.chat.conversation(row.messages, every_turn=every_turn)
                else:
                    group = self.chat.plain_text(row.text)
            except UserError as error:
                raise UserError(f"{self._where(row.id)}: {error}") from error
            groups += self._limited([group], row.id)
        return groups

    def comparisons(self) -> list[TokenGroup]:
        """Every pair in both orders, for a model that answers which response is better."""
        form, groups = PairwiseFormat(self.chat), []
        for pair in load_preference_pairs(self.run.data, **self._options):
            comparison = Comparison(pair.prompt.messages, pair.chosen, pair.rejected)
            groups += self._limited(form.training_groups(comparison), pair.prompt.id)
        return groups

    def pairs(self) -> tuple[list[TokenGroup], list[float]]:
        """(chosen, rejected) as tokens, and the margins."""
        groups, margins = [], []
        for pair in load_preference_pairs(self.run.data, **self._options):
            responses = [self.chat.response_ids(text) for text in (pair.chosen, pair.rejected)]
            group = TokenGroup(self.chat.prompt_ids(pair.prompt.messages), responses)
            if kept := self._limited([group], pair.prompt.id):
                groups += kept
                margins.append(pair.margin)
        return groups, margins

    def labelled(self) -> tuple[list[TokenGroup], list[list[bool]]]:
        """Responses as tokens, and which of them are desirable."""
        groups, labels = [], []
        for row in load_labelled_texts(self.run.data, **self._options):
            responses = [self.chat.response_ids(text) for text in row.responses]
            group = TokenGroup(self.chat.prompt_ids(row.prompt.messages), responses)
            if kept := self._limited([group], row.prompt.id):
                groups += kept
                labels.append(row.labels)
        return groups, labels

    def scored(self, *, together: bool) -> tuple[list[ScoredResponses], list[str]]:
        """Responses with their scores, a prompt's `together` or each alone; the scores' names."""
        rows = load_scored_texts(self.run.data, **self._options)
        names = sorted({name for row in rows for scores in row.scores for name in scores})
        examples = []
        for row in rows:
            responses = [self.chat.response_ids(text) for text in row.responses]
            group = TokenGroup(self.chat.prompt_ids(row.prompt.messages), responses)
            values = [[scores.get(name, float("nan")) for name in names] for scores in row.scores]
            parts = [(group, values)]
            if not together:
                parts = [(single, [scores]) for single, scores in zip(group.split(), values)]
            for part, scores in parts:
                kept = self._limited([part], row.prompt.id)
                examples += [ScoredResponses(limited, scores) for limited in kept]
        return examples, names

    def _limited(self, groups: Iterable[TokenGroup], row_id: str) -> list[TokenGroup]:
        limits, where, report = self.run.lengths, self._where(row_id), self.session.report
        limited = [limit_length(group, limits, where, report) for group in groups]
        return [group for group in limited if group]

    def _where(self, row_id: str) -> str:
        return f"{self.run.data}, id {row_id}"
