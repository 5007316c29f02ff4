"""The critic of PPO: a decoder with a value head, read before every response token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import GroupBatch
from rlhf_fast.models.checkpoint import load_pretrained


@dataclass(frozen=True)
class CriticConfig:
    """The value model of PPO."""

    model: str | None = None
    """Model to start from, e.g. a reward model; None takes the policy's with a new head."""
    learning_rate: float = 1e-5
    """Peak learning rate; batches, epochs and schedule are the policy's."""
    clip: float = 0.2
    """Largest change of a value against the one before the update; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip < 0:
            raise UserError(
                f"rl.critic: learning_rate must be > 0 and clip >= 0, got {self.learning_rate} "
                f"and {self.clip}"
            )


class Critic(Backbone):
    """A `*ForTokenClassification` model with one label."""

    fresh_scale = 1.0
    """Of a fresh head's weights."""

    def __init__(self, model: nn.Module, **options) -> None:
        super().__init__(model, **options)
        self.head: nn.Linear = model.score

    @classmethod
    def load(cls, path: Path | str, *, device: str, seed: int = 0, **options) -> Critic:
        """A critic's checkpoint, a reward model, or any language model with a fresh head.

        A fresh head is drawn with deviation fresh_scale / sqrt(D + 1) (arXiv 2403.17031).
        """
        from transformers import AutoModelForTokenClassification

        kind, settings = AutoModelForTokenClassification, {"num_labels": 1, "dtype": torch.float32}
        model, new = load_pretrained(kind, path, "make a critic", **settings)
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise UserError(f"{type(model).__name__} has no linear head named `score`")
        with torch.no_grad():
            if "score.weight" in new:
                generator = torch.Generator().manual_seed(seed)
                scale = cls.fresh_scale / (model.score.in_features + 1) ** 0.5
                weight = torch.randn(model.score.weight.shape, generator=generator)
                model.score.weight.copy_(weight * scale)
            if "score.bias" in new:
                model.score.bias.zero_()
        return cls(model.to(device).eval(), **options)

    def values(self, batch: GroupBatch) -> Tensor:
        """[M] fp32 value of the state before each response token."""
        return self.read(self.states(batch, batch.source))

    def read(self, hidden: Tensor) -> Tensor:
        """[M, D] states -> [M] fp32: the head alone."""
        bias = None if self.head.bias is None else self.head.bias.float()
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(hidden.float(), self.head.weight.float(), bias)[:, 0]


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """`1 - Var(R - V) / Var(R)`: 1 is a perfect critic, below 0 is worse than the mean."""
    v, r = torch.tensor(values), torch.tensor(returns)
    variance = r.var(unbiased=False).item()
    return 1 - (r - v).var(unbiased=False).item() / variance if variance > 0 else float("nan")
