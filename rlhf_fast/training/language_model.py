"""A Hugging Face causal LM seen as decoder and head, so the head runs on response tokens only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.training.batches import GroupBatch, TokenGroup, collate, micro_batches

Precision = Literal["bf16", "fp32"]
LOGITS_CHUNK_BYTES = 256 << 20
"""Logits held at once by the head; more rows than this are recomputed in backward."""


def load_causal_lm(path: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal LM from a directory or a hub name, safetensors only, no remote code."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise UserError(f"no such model directory: {path}")
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a causal language model from {path!r}: {error}") from error


class LanguageModel:
    """Runs batches of prompt-sharing groups and returns log-probabilities or hidden states.

    Parameters stay in the model's dtype (float32 for training: bf16 weights round small updates
    away); `precision` is the dtype of the matrix products under autocast.
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
        self.head = model.get_output_embeddings()
        self.pad_token_id = pad_token_id
        self.precision = precision
        self.micro_batch_tokens = micro_batch_tokens
        self.logit_scale, self.softcap = _logit_transform(model.config)
        self._check_head()
        self.shares_prompts = self._can_share_prompts()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden_states(self, batch: GroupBatch) -> Tensor:
        """[B*L, D] final hidden states."""
        with self._autocast():
            output = self.decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )
        return output.last_hidden_state.flatten(0, 1)

    def token_logps(self, batch: GroupBatch) -> Tensor:
        """[M] fp32 log-probabilities of the response tokens."""
        hidden = self.hidden_states(batch)[batch.source]
        rows = max(1, LOGITS_CHUNK_BYTES // (self.head.weight.shape[0] * 4))
        if len(hidden) <= rows:
            return self._head_logps(hidden, batch.labels)
        parts = [
            checkpoint(self._head_logps, h, y, use_reentrant=False)
            for h, y in zip(hidden.split(rows), batch.labels.split(rows))
        ]
        return torch.cat(parts)

    def response_logps(self, batch: GroupBatch) -> Tensor:
        """[R] fp32 log-probability of each response, summed over its tokens."""
        zeros = torch.zeros(batch.num_responses, device=self.device)
        return zeros.index_add(0, batch.response_index, self.token_logps(batch))

    def collate(self, groups: Sequence[TokenGroup]) -> GroupBatch:
        """Builds the batch; models that cannot share a prompt get one row per response."""
        if not self._shares(groups):
            groups = [single for group in groups for single in group.split()]
        return collate(groups, self.pad_token_id).to(self.device)

    @torch.no_grad()
    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Log-probability of every response of every group, in order."""
        return self.map_responses(groups, self.response_logps)

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

    def _head_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits = F.linear(hidden, self.head.weight, getattr(self.head, "bias", None))
        # The logits are this function's own, so their gradient may overwrite them.
        return ops.logps(
            logits,
            labels,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            inplace_backward=True,
        ).logps

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _shares(self, groups: Sequence[TokenGroup]) -> bool:
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            return self.shares_prompts and max(g.num_tokens for g in groups) <= window
        return self.shares_prompts

    @torch.no_grad()
    def _check_head(self) -> None:
        """The model's own logits must be its head applied to its decoder's hidden states."""
        batch = collate([_PROBE.split()[0]], self.pad_token_id).to(self.device)
        if self.head is None:
            raise UserError(f"{type(self.model).__name__} has no output embeddings: not a causal LM")
        was_training = self.model.training
        self.model.eval()
        hidden = self.decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = self.head(hidden).float() * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        expected = self.model(input_ids=batch.input_ids, use_cache=False).logits.float()
        self.model.train(was_training)
        error = (logits - expected).abs().max().item()
        if not error <= 1e-2 * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"{type(self.model).__name__}: its logits are not its output embedding applied to "
                f"its decoder's hidden states (difference {error:.3g}); this architecture is not "
                f"supported"
            )

    @torch.no_grad()
    def _can_share_prompts(self) -> bool:
        """Whether the model honours a tree attention mask; recurrent models do not."""
        was_training = self.model.training
        self.model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shared = self._probe_hidden([_PROBE])
            except (ValueError, RuntimeError, TypeError, IndexError):
                shared = None
            separate = self._probe_hidden(_PROBE.split())
        self.model.train(was_training)
        if shared is not None and torch.allclose(shared, separate, rtol=1e-2, atol=1e-2):
            return True
        warnings.warn(
            f"{type(self.model).__name__} cannot share a prompt between responses; each response "
            f"is computed in a row of its own",
            stacklevel=3,
        )
        return False

    def _probe_hidden(self, groups: Sequence[TokenGroup]) -> Tensor:
        batch = collate(groups, self.pad_token_id).to(self.device)
        output = self.decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[batch.last].float()


_PROBE = TokenGroup([5, 6, 7], [[8, 9], [10, 11, 12]])


def _logit_transform(config) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to its logits, from its configuration."""
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)
