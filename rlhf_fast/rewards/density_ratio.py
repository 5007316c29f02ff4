"""Rewards that need no reward model: the log-density ratio of two language models."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.rewards.scorer import finite
from rlhf_fast.types import Group, Message, ScoredGroup


class DensityRatioScorer:
    """`scale * (log strong(y | x) - log weak(y | x))`, summed over the tokens of y; without a weak
    model its term is 0.

    With an aligned model and its base model this ranks like a reward model (CDR, arXiv
    2411.02481); with a DPO policy and its reference it is DPO's implicit reward, `scale` being
    beta; a model alone rewards what it finds likely (sharpening, arXiv 2412.01951). `criteria`, a
    system message for the strong model alone, steers what is rewarded. The models may have
    different tokenizers: each tokenises the text for itself.
    """

    scores_alone = True

    def __init__(
        self,
        strong: LanguageModel,
        weak: LanguageModel | None,
        strong_chat: ChatFormat,
        weak_chat: ChatFormat | None,
        *,
        criteria: str | None = None,
        scale: float = 1.0,
    ) -> None:
        self.strong = strong
        self.weak = weak
        self.strong_chat = strong_chat
        self.weak_chat = weak_chat
        self.criteria = criteria
        self.scale = scale

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        strong = self.strong.score_groups(
            [_tokens(self.strong_chat, g, self._steered(g[0].prompt.messages)) for g in groups]
        )
        weak = [[0.0] * len(group) for group in groups]
        if self.weak is not None and self.weak_chat is not None:
            weak = self.weak.score_groups(
                [_tokens(self.weak_chat, g, g[0].prompt.messages) for g in groups]
            )
        ratios = [
            [self.scale * (p - q) for p, q in zip(*rows)] for rows in zip(strong, weak, strict=True)
        ]
        return [
            ScoredGroup(g[0].prompt, list(g), finite(r, "strong_model and weak_model", g[0].prompt))
            for g, r in zip(groups, ratios)
        ]

    def _steered(self, messages: list[Message]) -> list[Message]:
        if self.criteria is None:
            return messages
        system = [m["content"] for m in messages if m["role"] == "system"]
        others = [m for m in messages if m["role"] != "system"]
        content = "\n\n".join([*system, self.criteria])
        return [{"role": "system", "content": content}, *others]


def _tokens(chat: ChatFormat, group: Group, messages: list[Message]) -> TokenGroup:
    responses = [chat.response_ids(c.text, finished=c.finished) for c in group]
    # An empty response that was cut off has no token; the end token stands in for it.
    return TokenGroup(chat.prompt_ids(messages), [ids or [chat.end_token_id] for ids in responses])
