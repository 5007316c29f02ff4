"""A policy with its reference, and the one that learns from preference pairs."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast.models.adapters import adapters_off, merged_parameters
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.checkpoint import load_weights, save_model
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.engine_state import gathered
from rlhf_fast.training.fit import FitOptions
from rlhf_fast.training.preference import DPOConfig, train_dpo
from rlhf_fast.training.reference import shared_scores
from rlhf_fast.types import Group, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReferencedPolicy:
    """A model that learns, tied to a reference; the optimiser starts afresh in every update.

    Where adapters are trained, model and reference are one, which is the reference without them.
    In a launch every process has both whole, but while the update spreads the model over them.
    """

    def __init__(
        self,
        model: LanguageModel,
        reference: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
        options: FitOptions = FitOptions(),  # noqa: B008, frozen
    ) -> None:
        self.model = model
        self.reference = reference
        self.tokenizer = tokenizer
        self.on_step = on_step
        self.options = options

    def update(self, selected: Sequence, *, seed: int) -> list[dict[str, float]]:
        """One round of training; returns metrics per optimiser step."""
        rows = self._train(selected, seed)
        is_shared = self.reference.model is self.model.model
        self.model = whole(self.model)
        if is_shared:
            self.reference = self.model
        return rows

    def _train(self, selected: Sequence, seed: int) -> list[dict[str, float]]:
        raise NotImplementedError

    def as_reference(self) -> contextlib.AbstractContextManager:
        """Within it `reference.model` is the reference."""
        is_shared = self.reference.model is self.model.model
        return adapters_off(self.reference.model) if is_shared else contextlib.nullcontext()

    def kl(self, groups: Sequence[Group]) -> float:
        """Mean of log pi(y|x) - log pi_ref(y|x) over the responses: a sample estimate, in nats."""
        tokens = [TokenGroup(g[0].prompt_token_ids, [c.token_ids for c in g]) for g in groups]
        ours = shared_scores(self.model, tokens, self.options.accelerator)
        with self.as_reference():
            theirs = shared_scores(self.reference, tokens, self.options.accelerator)
        return statistics.fmean(p - q for a, b in zip(ours, theirs) for p, q in zip(a, b))

    def move_reference(self) -> None:
        """Makes the present policy the reference."""
        self.reference.model.load_state_dict(self.model.model.state_dict())

    @torch.no_grad()
    def average_reference(self, path: Path, decay: float) -> None:
        """`reference <- decay * reference + (1 - decay) * policy`, saved to `path`."""
        ours, theirs = self.model.model.parameters(), self.reference.model.parameters()
        for new, kept in zip(ours, theirs, strict=True):
            kept.lerp_(new.to(kept.dtype), 1 - decay)
        save_model(path, self.reference.model, self.tokenizer)

    def load_reference(self, path: Path) -> None:
        load_weights(path, self.reference.model)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by their Hugging Face names, tied ones once, adapters merged in."""
        return merged_parameters(self.model.model)

    def save(self, path: Path, **options) -> None:
        """Options as `save_model` takes them."""
        save_model(path, self.model.model, self.tokenizer, **options)

    def load(self, path: Path) -> None:
        load_weights(path, self.model.model)


class DPOPolicy(ReferencedPolicy):
    """Trains `model` on preference pairs against `reference`."""

    def __init__(self, *models, config: DPOConfig, **options) -> None:
        super().__init__(*models, **options)
        self.config = config

    def _train(self, pairs: Sequence[PreferencePair], seed: int) -> list[dict[str, float]]:
        return train_dpo(
            self.model,
            self.reference,
            pairs,
            config=self.config,
            seed=seed,
            on_step=self.on_step,
            options=self.options,
        )


def whole(backbone: Backbone) -> Backbone:
    """The backbone with whole parameters, if training has spread them over processes."""
    model = gathered(backbone.model)
    return backbone if model is backbone.model else backbone.around(model.to(backbone.device))
