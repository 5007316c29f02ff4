"""Rewards of segments: sentences, or runs of tokens that the language model finds predictable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.rewards.scorer import finite
from rlhf_fast.types import Group, ScoredGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Boundary = Literal["sentences", "entropy"]


class Segmenter:
    """Marks the tokens that end a segment; a response's last token always does.

    Without `language_model` segments are sentences: they end at . ! ? or a new line, unless a
    digit follows. With it a token begins a segment where the entropy of its prediction is above
    `threshold` nats (SegRM, arXiv 2501.02790, section 3.1).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        threshold: float = 0.0,
        language_model: LanguageModel | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.threshold = threshold
        self.language_model = language_model

    def mark(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """The groups with the ends of segments as their learned tokens."""
        if self.language_model is None:
            ends = [[self._sentence_ends(r) for r in group.responses] for group in groups]
        else:
            ends = [[self._ends(row) for row in rows] for rows in self._entropies(groups)]
        return [TokenGroup(g.prompt_ids, g.responses, marks) for g, marks in zip(groups, ends)]

    def _sentence_ends(self, response: list[int]) -> list[bool]:
        pieces = [self.tokenizer.decode([token]) for token in response]
        return sentence_ends(pieces)

    def _ends(self, entropies: Sequence[float]) -> list[bool]:
        return [entropy > self.threshold for entropy in entropies[1:]] + [True]

    def _entropies(self, groups: Sequence[TokenGroup]) -> list[list[list[float]]]:
        model = self.language_model

        def entropy(batch: GroupBatch):
            hidden = model.states(batch, batch.source)
            return _by_response(
                batch, model.head_outputs(hidden, batch.labels, ("entropy",)).entropy
            )

        return [
            [row[: len(r)] for row, r in zip(rows, group.responses)]
            for rows, group in zip(model.map_responses(groups, entropy), groups)
        ]


def sentence_ends(pieces: Sequence[str]) -> list[bool]:
    """Which of a text's pieces end a sentence."""
    following = [*pieces[1:], ""]
    ends = [
        ("\n" in piece or piece.rstrip().endswith((".", "!", "?"))) and not after[:1].isdigit()
        for piece, after in zip(pieces, following)
    ]
    return [*ends[:-1], True]


def lengths_of(marks: Sequence[bool]) -> list[int]:
    """Tokens of each segment."""
    ends = [i + 1 for i, is_end in enumerate(marks) if is_end]
    return [end - start for start, end in zip([0, *ends], ends)]


@dataclass(frozen=True)
class Normaliser:
    """Mean and deviation of a segment's reward by where it ends: `slope * log(p) + constant`.

    p in (0, 1] is the share of the response up to there. Source: SegRM, arXiv 2501.02790, section
    3.2; the deviation's line is fitted to the distances from the mean's line.
    """

    mean: tuple[float, float] = (0.0, 0.0)
    deviation: tuple[float, float] = (0.0, 1.0)
    lowest: float = 1e-3
    """Deviations are at least this."""

    def __call__(self, reward: float, place: float) -> float:
        mean, deviation = (
            slope * math.log(place) + constant for slope, constant in (self.mean, self.deviation)
        )
        return (reward - mean) / max(deviation, self.lowest)


def fit_normaliser(rewards: Sequence[float], places: Sequence[float]) -> Normaliser:
    """Least squares of the rewards, and then of their distances from the line, on log(p)."""
    logs = [math.log(place) for place in places]
    mean = _line(logs, rewards)
    # The mean distance of a normal variable is sqrt(2 / pi) of its deviation.
    scale = math.sqrt(math.pi / 2)
    distances = [scale * abs(r - mean[0] * x - mean[1]) for r, x in zip(rewards, logs)]
    lowest = max(0.1 * statistics.fmean(distances), 1e-6)
    return Normaliser(mean, _line(logs, distances), lowest)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    if len(set(x)) < 2:
        return 0.0, statistics.fmean(y)
    return tuple(statistics.linear_regression(x, y))


class SegmentScorer:
    """Reads a reward model at the end of every segment.

    A model trained on segments: the reward is the mean of theirs, normalised by place, and each
    segment's share is spread evenly over its tokens. Any other reward model: the reward is the
    sum, and each share falls on its segment's last token (Fine-Grained RLHF, arXiv 2306.01693).
    """

    scores_alone = True

    def __init__(self, model: RewardModel, segmenter: Segmenter) -> None:
        model.check_ungated("reward.segments")
        self.model = model
        self.segmenter = segmenter
        self.normaliser = None
        if model.segments:
            line = model.segments["normaliser"]
            self.normaliser = Normaliser(
                tuple(line["mean"]), tuple(line["deviation"]), line["lowest"]
            )

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        marked = self.segmenter.mark([self._tokens(group) for group in groups])
        values = segment_rewards(self.model, marked)
        return [
            self._scored(group, tokens, rows) for group, tokens, rows in zip(groups, marked, values)
        ]

    def _tokens(self, group: Group) -> TokenGroup:
        """The sampled tokens themselves, where there are any: shares must fall on them."""
        if not all(completion.token_ids for completion in group):
            texts, finished = [c.text for c in group], [c.finished for c in group]
            return self.model.token_group(group[0].prompt.messages, texts, finished)
        for completion in group:
            if self.model.chat.decode(completion.token_ids) != completion.text:
                raise UserError(
                    f"reward.model: rewards of segments need a model with the policy's tokenizer; "
                    f"its own reads other text in the tokens of prompt {group[0].prompt.id!r}"
                )
        return TokenGroup(group[0].prompt_token_ids, [c.token_ids for c in group])

    def _scored(self, group: Group, tokens: TokenGroup, rows: list[list[float]]) -> ScoredGroup:
        shares = [self._shares(row, lengths_of(m)) for row, m in zip(rows, tokens.trained)]
        rewards = [math.fsum(row) for row in shares]
        finite(rewards, "the reward model", group[0].prompt)
        was_sampled = all(completion.token_ids for completion in group)
        shares = shares if was_sampled else None
        return ScoredGroup(group[0].prompt, list(group), rewards, token_rewards=shares)

    def _shares(self, rewards: Sequence[float], lengths: Sequence[int]) -> list[float]:
        shares, end, total = [], 0, sum(lengths)
        for reward, length in zip(rewards, lengths, strict=True):
            end += length
            if self.normaliser is None:
                shares += [*[0.0] * (length - 1), reward]
            else:
                normalised = self.normaliser(reward, end / total)
                shares += [normalised / len(rewards) / length] * length
        return shares


def segment_rewards(model: RewardModel, marked: Sequence[TokenGroup]) -> list[list[list[float]]]:
    """Per response one reward for each marked token."""

    def function(batch: GroupBatch):
        return _by_response(batch, model.combine(model.segment_outputs(batch)))

    return [
        [row[: sum(marks)] for row, marks in zip(rows, group.trained)]
        for rows, group in zip(model.map_responses(marked, function), marked)
    ]


def _by_response(batch: GroupBatch, values: torch.Tensor) -> torch.Tensor:
    """[M] -> [R, longest]: each response's values, and zeros behind them."""
    parts = values.split(batch.cu_seqlens.diff().tolist())
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def normaliser_of(model: RewardModel, marked: Sequence[TokenGroup]) -> Normaliser:
    """Fitted to the rewards that the model gives to these segments."""
    rewards, places = [], []
    for group, rows in zip(marked, segment_rewards(model, marked)):
        for row, marks in zip(rows, group.trained):
            ends = [i + 1 for i, is_end in enumerate(marks) if is_end]
            rewards += row
            places += [end / len(marks) for end in ends]
    return fit_normaliser(rewards, places)
