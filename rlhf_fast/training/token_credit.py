"""OREAL's token-level reward model: which tokens of a response speak for its outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.losses.policy import oreal_advantages
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.training.critic import Critic
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit
from rlhf_fast.training.token_values import TokenValues, offsets


@dataclass(frozen=True)
class OutcomeConfig:
    """Learning from right and wrong responses (OREAL, arXiv 2502.06781)."""

    right_reward: float = 0.5
    """A response is right if its reward is at least this."""
    wrong_weight: float = 0.5
    """Factor on the advantage of wrong responses."""
    learning_rate: float = 2e-6
    """Peak learning rate of the token-level reward model; the rest is the policy's optimiser."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.wrong_weight < 0:
            raise UserError(
                f"rl.outcome: learning_rate must be > 0 and wrong_weight >= 0, got "
                f"{self.learning_rate} and {self.wrong_weight}"
            )


class TokenCredit(Critic):
    """A `*ForTokenClassification` model with one label, read after every response token.

    Starts with a head of zeros: no token speaks for anything yet.
    """

    fresh_scale = 0.0

    def scores(self, batch: GroupBatch) -> Tensor:
        """[M] fp32 score of each response token."""
        return self.read(self.states(batch, batch.target))


def fit_token_credit(
    model: TokenCredit,
    groups: Sequence[TokenGroup],
    is_right: Sequence[Sequence[bool]],
    *,
    config: OptimizerConfig,
    seed: int,
    options: FitOptions | None = None,
) -> list[dict[str, float]]:
    """Logistic regression of the outcome on the mean score of a response's tokens.

    Source: OREAL, arXiv 2502.06781, equation 12.
    """
    examples = list(zip(groups, is_right, strict=True))

    def loss(part, batch):
        tokens = [group for group, _ in part]
        scores = model.scores(model.collate(tokens))
        means = ops.segment_sum(scores, cu_seqlens=offsets(tokens, scores.device), mean=True)
        right = torch.tensor([x for _, row in part for x in row], device=means.device)
        count = sum(len(row) for _, row in batch)
        losses = F.binary_cross_entropy_with_logits(means, right.float(), reduction="sum")
        return losses / count, {"accuracy": ((means > 0) == right).float().sum() / count}

    sizes = [model.num_tokens(group) for group in groups]
    settings = {"config": config, "seed": seed, "options": options}
    return fit(model, examples, loss, sizes=sizes, **settings)


def outcome_advantages(
    rewards: Sequence[float], scores: TokenValues, config: OutcomeConfig
) -> TokenValues:
    """One prompt's advantages: right responses are cloned, wrong ones get leave-one-out.

    Right and wrong responses count alike however many there are, as if one of each were drawn; so
    all are used. Each token is weighed by what the token-level reward model says of it.
    """
    count, right = len(rewards), [r >= config.right_reward for r in rewards]
    num_right = sum(right)
    result = []
    for is_right, row in zip(right, scores, strict=True):
        if is_right:
            advantage = count / (2 * num_right)
        else:
            left_out = num_right / max(count - 1, 1)
            advantage = -config.wrong_weight * left_out * count / (2 * (count - num_right))
        advantages, scores_of_row = (
            torch.tensor([x], dtype=torch.float32) for x in (advantage, row)
        )
        weighed = oreal_advantages(advantages, scores_of_row, torch.tensor([is_right]))
        result.append(weighed[0].tolist())
    return result
