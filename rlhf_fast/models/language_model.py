"""A Hugging Face causal LM seen as decoder and head, so the head runs on response tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.models.checkpoint import check_complete, load_pretrained
from rlhf_fast.models.tied import TiedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BUDGET_BYTES = 256 << 20
"""Logits kept for backward; those of further rows are computed again."""


def load_causal_lm(path: str, *, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Loads a causal LM from a directory or a hub name, adapters merged into their base."""
    from transformers import AutoModelForCausalLM

    purpose = "load a causal language model"
    model, new = load_pretrained(AutoModelForCausalLM, path, purpose, dtype=dtype)
    check_complete(path, model, new)
    return model


class LanguageModel(Backbone):
    """A backbone with its output embedding: log-probabilities of response tokens."""

    def __init__(self, model: PreTrainedModel, **options) -> None:
        super().__init__(model, **options)
        self.head = model.get_output_embeddings()
        self.logit_scale, self.softcap = _logit_transform(model.config)
        self._check_logits()
        self.tied = TiedWeight(model)

    def token_logps(self, batch: GroupBatch) -> Tensor:
        """[M] fp32 log-probabilities of the response tokens."""
        return self.logps_of_states(self.states(batch, batch.source), batch.labels)

    def logps_of_states(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[M] fp32 log-probability of each label after its hidden state [M, D]: the head alone."""
        return self.head_outputs(hidden, labels).logps

    def head_outputs(
        self,
        hidden: Tensor,
        labels: Tensor,
        outputs: tuple[str, ...] = ("logps",),
        temperature: float = 1.0,
    ) -> ops.LogpsOutput:
        """Those fields of `ops.LogpsOutput`, [M] fp32 each, of logits divided by `temperature`."""
        weight, bias = self._head_weight()
        with self.autocast():
            return ops.linear_logps(
                hidden,
                weight,
                labels,
                bias=bias,
                temperature=temperature,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                logits_budget_bytes=LOGITS_BUDGET_BYTES,
                outputs=outputs,
            )

    def preference_loss(
        self, hidden: Tensor, batch: GroupBatch, *ref_logps: Tensor, **options
    ) -> ops.LinearPreferenceOutput:
        """A loss of pairs, `ops.linear_preference_loss`: the head and its gradient in one pass.

        hidden: [M, D]; every group of the batch is (chosen, rejected); the rest as there.
        """
        weight, fixed = self._one_pass()
        with self.autocast():
            return ops.linear_preference_loss(
                hidden, weight, batch.labels, batch.cu_seqlens, *ref_logps, **fixed, **options
            )

    def policy_loss(
        self,
        hidden: Tensor,
        batch: GroupBatch,
        old_logps: Tensor,
        advantages: Tensor,
        *,
        temperature: float = 1.0,
        **options,
    ) -> ops.LinearPolicyOutput:
        """A policy-gradient loss, `ops.linear_policy_loss`: the head and its gradient in one pass.

        hidden: [M, D]; old_logps, advantages and the rest [M], as there.
        """
        weight, fixed = self._one_pass(temperature)
        with self.autocast():
            return ops.linear_policy_loss(
                hidden,
                weight,
                batch.labels,
                old_logps,
                advantages,
                cu_seqlens=batch.cu_seqlens,
                **fixed,
                **options,
            )

    def _head_weight(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = ops.head_weight(self.head)
        return self.tied.of_head(weight), bias

    def _one_pass(self, temperature: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
        """The head's weight, and what the losses in one pass take of this model besides it."""
        weight, bias = self._head_weight()
        settings = ops.HeadSettings(temperature, self.softcap, self.logit_scale)
        return weight, {
            "bias": bias,
            "settings": settings,
            "logits_budget_bytes": LOGITS_BUDGET_BYTES,
        }

    def response_logps(self, batch: GroupBatch) -> Tensor:
        """[R] fp32 log-probability of each response, summed over its tokens."""
        return ops.segment_sum(self.token_logps(batch), cu_seqlens=batch.cu_seqlens)

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Log-probability of every response of every group, in order, without gradient."""
        return self.map_responses(groups, self.response_logps)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """The model's own logits must be its head applied to its decoder's hidden states."""
        name = type(self.model).__name__
        if self.head is None:
            raise UserError(f"{name} has no output embeddings: it is not a causal language model")
        with self.evaluating():
            hidden = self.decoder(input_ids=self._few_tokens, use_cache=False).last_hidden_state
            weight, bias = ops.head_weight(self.head)  # what a hook adds to them would be lost
            logits = F.linear(hidden, weight, bias).float() * self.logit_scale
            expected = self.model(input_ids=self._few_tokens, use_cache=False).logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        what = "its logits are not its output embedding applied to its decoder's hidden states"
        self._check_head(logits, expected, what)


def _logit_transform(config) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to its logits, from its configuration."""
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)
