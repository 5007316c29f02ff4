"""Updates from selected responses: imitation, losses of good and bad ones, losses of lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError, refuse_unused
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.condition import ConditionedChat
from rlhf_fast.training.fit import OptimizerConfig, fit
from rlhf_fast.training.policy import ReferencedPolicy
from rlhf_fast.training.reference import reference_logps
from rlhf_fast.training.sft import train_sft
from rlhf_fast.training.unpaired import ScoredUnpairedConfig, train_unpaired
from rlhf_fast.types import ScoredGroup

MEAN_LOGPS = ("rrhf", "pro")
"""Losses of length-normalised log-probabilities, without a reference."""


@dataclass(frozen=True)
class ListConfig:
    """Losses of several ranked responses per prompt."""

    loss_type: Literal[tuple(ops.LIST_LOSSES)] = "lipo_lambda"  # type: ignore
    """The loss; formulas and sources are in csrc/math/lists.h."""
    beta: float = 0.1
    """Factor on the log-ratios to the reference (not of rrhf and pro)."""
    margin: float = 0.0
    """Of the pairwise hinge."""
    nll_weight: float = 0.0
    """Weight of the best response's negative score (the SFT terms of RRHF and PRO)."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-7, batch_size=64)
    )
    """Optimiser; its batches count prompts."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.margin < 0 or self.nll_weight < 0:
            raise UserError(
                f"list: beta must be > 0, margin and nll_weight >= 0, got {self.beta}, "
                f"{self.margin} and {self.nll_weight}"
            )
        tied = [name for name in ops.LIST_LOSSES if name not in MEAN_LOGPS]
        refuse_unused(self, "list", "loss_type", {"beta": tied, "margin": ("pairwise_hinge",)})


class NLLPolicy(ReferencedPolicy):
    """Imitates the selected responses: rejection sampling, expert iteration.

    With a `chat` of levels each follows the prompt that asks for its own: return-conditioned RL
    (arXiv 2403.04642). Source: RAFT, arXiv 2304.06767, equation 2; loss per token, as SFT.
    """

    def __init__(
        self, *models, config: OptimizerConfig, chat: ChatFormat | None = None, **options
    ) -> None:
        super().__init__(*models, **options)
        self.config = config
        self.chat = chat

    def _train(self, groups: Sequence[ScoredGroup], seed: int) -> list[dict[str, float]]:
        tokens = _token_groups(groups)
        if isinstance(self.chat, ConditionedChat):
            tokens = [part for group in groups for part in _by_level(group, self.chat)]
        return train_sft(
            self.model,
            tokens,
            config=self.config,
            seed=seed,
            on_step=self.on_step,
            options=self.options,
        )


class UnpairedPolicy(ReferencedPolicy):
    """Learns that some responses are desirable and others not, by their rewards: KTO."""

    def __init__(self, *models, config: ScoredUnpairedConfig, **options) -> None:
        super().__init__(*models, **options)
        self.config = config

    def _train(self, groups: Sequence[ScoredGroup], seed: int) -> list[dict[str, float]]:
        labels = [self.config.labels(group.rewards) for group in groups]
        kept = [group for group, known in zip(groups, labels) if known]
        if not kept:
            raise UserError(
                f"algorithm unpaired: the responses to each of {len(groups)} prompts have equal "
                f"rewards, so none is better than the others; sample more, or give "
                f"--unpaired.min-reward"
            )
        return train_unpaired(
            self.model,
            _token_groups(kept),
            [known for known in labels if known],
            reference=self.reference,
            config=self.config,
            seed=seed,
            on_step=self.on_step,
            options=self.options,
        )


@dataclass(frozen=True)
class _Ranked:
    group: TokenGroup
    rewards: list[float]
    ref_logps: list[float]


class ListPolicy(ReferencedPolicy):
    """Ranks all of a prompt's responses at once."""

    def __init__(self, *models, config: ListConfig, **options) -> None:
        super().__init__(*models, **options)
        self.config = config

    def _train(self, groups: Sequence[ScoredGroup], seed: int) -> list[dict[str, float]]:
        tokens = _token_groups(groups)
        if self.config.loss_type in MEAN_LOGPS:
            ref = [[0.0] * len(group.responses) for group in tokens]
        else:
            with self.as_reference():
                ref = reference_logps(
                    self.reference,
                    tokens,
                    with_adapters=True,
                    accelerator=self.options.accelerator,
                )
        examples = [_Ranked(t, g.rewards, r) for t, g, r in zip(tokens, groups, ref)]
        return fit(
            self.model,
            examples,
            self._loss,
            sizes=[self.model.num_tokens(group) for group in tokens],
            config=self.config.optimizer,
            seed=seed,
            on_step=self.on_step,
            options=self.options,
        )

    def _loss(
        self, part: Sequence[_Ranked], batch: Sequence[_Ranked]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, model = self.config, self.model
        logps = model.response_logps(model.collate([example.group for example in part]))
        if config.loss_type in MEAN_LOGPS:
            lengths = [len(response) for e in part for response in e.group.responses]
            scores = logps / torch.tensor(lengths, device=logps.device)
        else:
            ref = [r for e in part for r in e.ref_logps]
            scores = config.beta * (logps - model.floats(ref))
        rewards = model.floats([r for e in part for r in e.rewards])
        counts = torch.tensor([0, *(len(e.rewards) for e in part)], device=logps.device)
        loss = ops.list_loss(
            scores,
            rewards,
            counts.cumsum(0),
            loss_type=config.loss_type,
            margin=config.margin,
            nll_weight=config.nll_weight,
            reduction="sum",
        )
        sizes = counts[1:].tolist()
        tops = zip(scores.detach().split(sizes), rewards.split(sizes))
        right = sum((s.argmax() == r.argmax()).float() for s, r in tops)
        return loss / len(batch), {"top_accuracy": right / len(batch)}


def _by_level(group: ScoredGroup, chat: ConditionedChat) -> list[TokenGroup]:
    levels: dict[int, list[list[int]]] = {}
    for completion, reward in zip(group.completions, group.rewards):
        levels.setdefault(chat.condition.level(reward), []).append(completion.token_ids)
    return [
        TokenGroup(chat.prompt_ids(group.prompt.messages, level), responses)
        for level, responses in levels.items()
    ]


def _token_groups(groups: Sequence[ScoredGroup]) -> list[TokenGroup]:
    return [
        TokenGroup(g.completions[0].prompt_token_ids, [c.token_ids for c in g.completions])
        for g in groups
    ]
