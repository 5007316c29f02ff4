"""A Hugging Face decoder that computes each prompt once for all its responses."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.models.batches import GroupBatch, TokenGroup, collate, micro_batches

Precision = Literal["bf16", "fp32"]


class Backbone:
    """Runs the decoder of a model over batches of prompt-sharing groups.

    Parameters keep the model's dtype (float32 for training: bf16 weights round small updates
    away); `precision` is the dtype of the matrix products, by autocast. Sharing is checked on the
    model itself: where a tree attention mask changes the result, as in recurrent models, each
    response gets a row of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_token_id: int,
        precision: Precision = "bf16",
        micro_batch_tokens: int = 4096,
    ) -> None:
        self.model = model
        self.decoder = model.base_model
        self.pad_token_id = pad_token_id
        self.precision = precision
        self.micro_batch_tokens = micro_batch_tokens
        self.shares_prompts = self._can_share_prompts()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def collate(self, groups: Sequence[TokenGroup]) -> GroupBatch:
        """Builds the batch on the model's device; responses keep their order."""
        if not self._shares(groups):
            groups = [single for group in groups for single in group.split()]
        return collate(groups, self.pad_token_id).to(self.device)

    def hidden_states(self, batch: GroupBatch) -> Tensor:
        """[B*L, D] final hidden states."""
        if batch.is_plain:
            inputs = {"attention_mask": batch.padding_mask}
        else:
            inputs = {
                "attention_mask": self._tree_mask(batch.attention_mask),
                "position_ids": batch.position_ids,
            }
        with self.autocast():
            output = self.decoder(input_ids=batch.input_ids, use_cache=False, **inputs)
        return output.last_hidden_state.flatten(0, 1)

    def _tree_mask(self, mask: Tensor) -> Tensor:
        if self.model.config._attn_implementation == "sdpa":
            return mask
        # The other implementations add the mask to the scores.
        lowest = torch.finfo(torch.float32).min
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, lowest)

    @torch.no_grad()
    def map_responses(
        self, groups: Sequence[TokenGroup], function: Callable[[GroupBatch], Tensor]
    ) -> list[list]:
        """Applies `function` (one value or row per response of a batch), batched by length."""
        results: dict[int, list] = {}
        sizes = [group.num_tokens for group in groups]
        for indices in micro_batches(sizes, self.micro_batch_tokens):
            values = function(self.collate([groups[i] for i in indices])).tolist()
            for i in indices:
                count = len(groups[i].responses)
                results[i], values = values[:count], values[count:]
        return [results[i] for i in range(len(groups))]

    def _shares(self, groups: Sequence[TokenGroup]) -> bool:
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            # The tree mask replaces the window's, so it is exact only while nothing leaves it.
            return self.shares_prompts and max(g.num_tokens for g in groups) <= window
        return self.shares_prompts

    @torch.no_grad()
    def _can_share_prompts(self) -> bool:
        was_training = self.model.training
        self.model.eval()
        separate = self._probe(_PROBE.split())
        try:
            shared = self._probe([_PROBE])
        except (ValueError, RuntimeError, TypeError, IndexError):
            shared = torch.full_like(separate, torch.nan)
        self.model.train(was_training)
        scale = separate.abs().max().item()
        if torch.allclose(shared, separate, rtol=0, atol=2e-2 * scale):
            return True
        warnings.warn(
            f"{type(self.model).__name__} cannot share a prompt between responses; each response "
            f"is computed in a row of its own",
            stacklevel=3,
        )
        return False

    def _probe(self, groups: Sequence[TokenGroup]) -> Tensor:
        batch = collate(groups, self.pad_token_id).to(self.device)
        return self.hidden_states(batch)[batch.last].float()


_PROBE = TokenGroup([5, 6, 7], [[8, 9], [10, 11, 12]])
