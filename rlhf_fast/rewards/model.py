"""A reward model as scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_fast.errors import UserError
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.types import Group, ScoredGroup


class RewardModelScorer:
    """Scores completions with a reward model."""

    def __init__(self, reward_model: RewardModel) -> None:
        self.reward_model = reward_model

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        model = self.reward_model
        tokens = [
            model.token_group(g[0].prompt.messages, [c.text for c in g], [c.finished for c in g])
            for g in groups
        ]
        rewards = model.map_responses(tokens, model.rewards)
        for group, values in zip(groups, rewards):
            if not all(map(math.isfinite, values)):
                raise UserError(
                    f"the reward model gave {values} on prompt {group[0].prompt.id!r}; "
                    f"try precision fp32 or another model"
                )
        return [ScoredGroup(g[0].prompt, list(g), r) for g, r in zip(groups, rewards)]
