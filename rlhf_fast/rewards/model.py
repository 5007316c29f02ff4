"""Reward models as scorers."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.rewards.ensemble import REDUCTIONS, Reduction
from rlhf_fast.rewards.scorer import finite
from rlhf_fast.types import Group, ScoredGroup


class RewardModelScorer:
    """Scores completions with a reward model."""

    scores_alone = True

    def __init__(self, reward_model: RewardModel) -> None:
        if reward_model.segments is not None:
            raise UserError(
                "this reward model scores segments: it can be reward.model, or part of a composed "
                "reward, but no member of an ensemble and no judge of the evaluation"
            )
        self.reward_model = reward_model

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        model = self.reward_model
        rewards = model.map_responses(_tokens(model, groups), model.rewards)
        return [
            ScoredGroup(g[0].prompt, list(g), finite(r, "the reward model", g[0].prompt))
            for g, r in zip(groups, rewards)
        ]


class HeadsScorer:
    """An ensemble of heads or adapters on one backbone: each response's outputs as one reward.

    Heads cost one forward instead of one per member (arXiv 2401.16635). A head's weight in the
    model's configuration (`reward_weights`) scales its opinion relative to the mean weight.
    """

    scores_alone = True

    def __init__(
        self, reward_model: RewardModel, reduction: Reduction, *, coefficient: float = 1.0
    ) -> None:
        if reward_model.num_outputs < 2:
            raise UserError(
                f"reward.ensemble.reduction {reduction} needs several opinions: a reward model "
                f"with several heads or adapters, reward.models, or reward.ensemble.members >= 2"
            )
        reward_model.check_ungated(f"reward.ensemble.reduction {reduction}")
        self.reward_model = reward_model
        self.reduction = reduction
        self.coefficient = coefficient

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        model, reduce = self.reward_model, REDUCTIONS[self.reduction]
        factors = [w * len(model.reward_weights) for w in model.reward_weights]
        result = []
        outputs = model.map_responses(_tokens(model, groups), model.outputs)
        for group, rows in zip(groups, outputs):
            opinions = [[f * x for f, x in zip(factors, row)] for row in rows]
            rewards = [reduce(row, self.coefficient) for row in opinions]
            finite(rewards, "the reward model", group[0].prompt)
            names = [f"head_{k}" for k in range(1, len(factors) + 1)]
            components = {name: list(column) for name, column in zip(names, zip(*opinions))}
            result.append(ScoredGroup(group[0].prompt, list(group), rewards, components))
        return result


def _tokens(model: RewardModel, groups: Sequence[Group]) -> list[TokenGroup]:
    return [
        model.token_group(g[0].prompt.messages, [c.text for c in g], [c.finished for c in g])
        for g in groups
    ]
