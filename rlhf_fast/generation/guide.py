"""A second model beside the one that generates: their logits are mixed at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferenceGuide:
    """Computes the reference's logits for the same tokens, with a cache of its own.

    `mask` [B, L] marks the prompts' tokens (left-padded), `guidance` [B] is the g of
    `(1 + g) * policy - g * reference`: PILAF's (arXiv 2502.04270) with +-beta, Nash-MD's geometric
    mixture (arXiv 2312.00886) with minus the reference's share, the reference itself with -1.
    """

    def __init__(self, model: PreTrainedModel, mask: Tensor, guidance: Tensor) -> None:
        self.model = model
        self.mask = mask
        self.guidance = guidance[:, None]
        self.cache = None

    def mix(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] logits of the mixture for the token after `input_ids` [B, T]."""
        ones = self.mask.new_ones(len(input_ids), input_ids.shape[1] - self.mask.shape[1])
        mask = torch.cat([self.mask, ones], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        new = input_ids.shape[1] if self.cache is None else 1
        output = self.model(
            input_ids=input_ids[:, -new:],
            attention_mask=mask,
            position_ids=positions[:, -new:],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return scores + self.guidance * (scores - output.logits[:, -1].to(scores.dtype))
