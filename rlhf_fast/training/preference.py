"""DPO training of a policy on preference pairs, with the reference computed once per data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.losses import dpo_loss
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit
from rlhf_fast.training.reference import reference_logps
from rlhf_fast.types import PreferencePair


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation of the policy."""

    beta: float = 0.1
    """Strength of the tie to the reference model."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences (conservative DPO)."""
    nll_weight: float = 0.0
    """Weight of the chosen response's mean negative log-probability per token (arXiv 2404.19733,
    equation 2); keeps the chosen responses, and their ends, likely while the gap grows."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-7, num_epochs=2, batch_size=128)
    )
    """Optimiser; a fresh one in every iteration."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"dpo.beta must be > 0, got {self.beta}")
        if self.nll_weight < 0:
            raise UserError(f"dpo.nll_weight must be >= 0, got {self.nll_weight}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


@dataclass(frozen=True)
class _Example:
    group: TokenGroup
    ref_logps: list[float]  # chosen, rejected


def train_dpo(
    policy: LanguageModel,
    reference: LanguageModel | None,
    pairs: Sequence[PreferencePair],
    *,
    config: DPOConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
    reference_cache: Path | None = None,
) -> list[dict[str, float]]:
    """One round of DPO (arXiv 2305.18290); returns metrics per optimiser step.

    The sampled token ids are trained as they are. Chosen and rejected share their prompt's
    computation; `reference` runs once over all pairs and never inside a step. Without one, it is
    the policy as it comes in, without its adapters if it has any. `reference_cache` is a directory
    that keeps the reference's log-probabilities.
    """
    options = options or FitOptions()
    groups = [
        TokenGroup(p.chosen.prompt_token_ids, [p.chosen.token_ids, p.rejected.token_ids])
        for p in pairs
    ]
    ref_logps = reference_logps(
        reference or policy, groups, cache=reference_cache, accelerator=options.accelerator
    )
    examples = [_Example(group, logps) for group, logps in zip(groups, ref_logps)]

    def loss(
        part: Sequence[_Example], batch: Sequence[_Example]
    ) -> tuple[Tensor, dict[str, float]]:
        collated = policy.collate([example.group for example in part])
        chosen, rejected = policy.response_logps(collated).view(-1, 2).unbind(1)
        ref_logps = torch.tensor([e.ref_logps for e in part], device=chosen.device)
        result = dpo_loss(
            chosen,
            rejected,
            *ref_logps.unbind(1),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
        )
        lengths = [len(e.group.responses[0]) for e in part]
        nll = -chosen / torch.tensor(lengths, device=chosen.device)
        margin = result.chosen_rewards - result.rejected_rewards
        totals = {
            "reward_accuracy": (margin > 0).float().sum(),
            "reward_margin": margin.sum(),
            "chosen_logps": chosen.detach().sum(),
            "rejected_logps": rejected.detach().sum(),
            "chosen_nll": nll.detach().sum(),
        }
        total = (result.loss + config.nll_weight * nll).sum()
        return total / len(batch), {name: total / len(batch) for name, total in totals.items()}

    return fit(
        policy,
        examples,
        loss,
        sizes=[policy.num_tokens(group) for group in groups],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
    )
