"""Supervised fine-tuning on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit


def train_sft(
    policy: LanguageModel,
    groups: Sequence[TokenGroup],
    *,
    config: OptimizerConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> list[dict[str, float]]:
    """Maximises the mean log-probability per response token; returns metrics per step."""

    def loss(
        part: Sequence[TokenGroup], batch: Sequence[TokenGroup]
    ) -> tuple[Tensor, dict[str, float]]:
        num_tokens = sum(group.num_trained for group in batch)
        return -policy.token_logps(policy.collate(part)).sum() / num_tokens, {}

    return fit(
        policy,
        groups,
        loss,
        sizes=[policy.num_tokens(group) for group in groups],
        config=config,
        seed=seed,
        on_step=on_step,
        options=options,
    )
