"""Reward models: a sequence-classification head on the last token of the response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.types import Message

HEAD_NAMES = ("score", "classifier")


class RewardModel(Backbone):
    """A `*ForSequenceClassification` model with one label, read at the response's last token.

    The end is found from the lengths, never by looking for the pad token: with pad = eos that
    search stops at the wrong token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        super().__init__(model, pad_token_id=self.chat.end_token_id, **options)
        head = next((n for n in HEAD_NAMES if isinstance(getattr(model, n, None), nn.Linear)), None)
        if head is None or getattr(model, head).out_features != 1:
            raise UserError(
                f"{type(model).__name__} is not a reward model: it needs a linear head with one "
                f"output named {' or '.join(HEAD_NAMES)}"
            )
        self.head: nn.Linear = getattr(model, head)

    @classmethod
    def load(cls, path: str, *, device: str = "cpu", **options) -> RewardModel:
        """Loads a model with one label from a directory or a hub name."""
        tokenizer = load_tokenizer(path)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                path, dtype="auto", trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a reward model from {path!r}: {error}") from error
        return cls(model.to(device).eval(), tokenizer, **options)

    def features(self, batch: GroupBatch) -> Tensor:
        """[R, D] fp32 final hidden state at each response's last token."""
        return self.hidden_states(batch)[batch.last].float()

    def rewards(self, batch: GroupBatch) -> Tensor:
        """[R] fp32 reward of each response."""
        bias = None if self.head.bias is None else self.head.bias.float()
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(self.features(batch), self.head.weight.float(), bias)[:, 0]

    def token_group(
        self, messages: list[Message], texts: Sequence[str], finished: Sequence[bool]
    ) -> TokenGroup:
        """Tokenises with this model's own template; a response that was cut gets no end token."""
        responses = [self.chat.response_ids(t, finished=f) for t, f in zip(texts, finished)]
        # An empty response that was cut has no last token; the end token stands in for it.
        responses = [ids or [self.chat.end_token_id] for ids in responses]
        return TokenGroup(self.chat.prompt_ids(messages), responses)
