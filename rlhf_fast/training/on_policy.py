"""On-policy RL: policy-gradient updates from sampled responses and their rewards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.checkpoint import load_weights, save_model
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.ops.policy_params import LOSS_TYPES
from rlhf_fast.training.advantages import Rollout, with_advantages
from rlhf_fast.training.critic import Critic, explained_variance
from rlhf_fast.training.fit import fit
from rlhf_fast.training.policy import ReferencedPolicy
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.training.token_values import offsets, packed, token_values
from rlhf_fast.types import ScoredGroup


class RLPolicy(ReferencedPolicy):
    """Trains `model` by policy gradients on scored responses, with a critic where GAE asks for one.

    Log-probabilities before the update are computed by the trainer, so the first step's ratios are
    exactly 1; those that the sampler recorded correct for its rounding and age.
    """

    def __init__(self, *models, config: RLConfig, critic: Critic | None = None, **options) -> None:
        super().__init__(*models, **options)
        self.config = config
        self.critic = critic
        if (config.advantage == "gae") != (critic is not None):
            raise UserError("rl: a critic goes with advantage gae")

    def update(self, groups: Sequence[ScoredGroup], *, seed: int) -> list[dict[str, float]]:
        rollouts = with_advantages(self._rollouts(groups), self.config)
        rows = fit(
            self.model,
            rollouts,
            self._loss,
            sizes=[self.model.num_tokens(r.group) for r in rollouts],
            config=self.config.optimizer,
            seed=seed,
            on_step=self.on_step,
        )
        if self.critic is None:
            return rows
        critic_rows = self._update_critic(rollouts, seed)
        return [row | extra for row, extra in zip(rows, critic_rows)]

    def save(self, path: Path) -> None:
        if self.critic is not None:
            save_model(path.parent / "critic", self.critic.model, self.tokenizer)
        super().save(path)

    def load(self, path: Path) -> None:
        super().load(path)
        if self.critic is not None:
            load_weights(path.parent / "critic", self.critic.model)

    def _rollouts(self, groups: Sequence[ScoredGroup]) -> list[Rollout]:
        needs_reference = self.config.kl_coef > 0 or self.config.reward_kl_coef > 0
        sampled = [_without_greedy(group, self.config.advantage) for group in groups]
        tokens = [
            TokenGroup(g.completions[0].prompt_token_ids, [c.token_ids for c in g.completions])
            for g, _ in sampled
        ]
        old = token_values(self.model, tokens, self.model.token_logps)
        nothing = [None] * len(tokens)
        ref = nothing
        if needs_reference:
            ref = token_values(self.reference, tokens, self.reference.token_logps)
        values = nothing
        if self.critic is not None:
            values = token_values(self.critic, tokens, self.critic.values)
        return [
            Rollout(group, g.rewards, o, [_recorded(c) for c in g.completions], r, baseline, v)
            for group, (g, baseline), o, r, v in zip(tokens, sampled, old, ref, values)
        ]

    def _loss(
        self, part: Sequence[Rollout], batch: Sequence[Rollout]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        groups = [rollout.group for rollout in part]
        logps = self.model.token_logps(self.model.collate(groups))
        device = logps.device
        corrects = self.config.sampling_correction != "none"

        def given(name: str) -> Tensor:
            return packed([getattr(rollout, name) for rollout in part], device)

        output = ops.policy_loss(
            logps,
            given("old_logps"),
            given("advantages"),
            cu_seqlens=offsets(groups, device),
            loss_type=self.config.loss_type,
            params=self.config.params(),
            ref_logps=given("ref_logps") if self.config.kl_coef > 0 else None,
            sampling_logps=given("sampling_logps") if corrects else None,
            normalizer=_normalizer(self.config.loss_type, batch),
        )
        share = _num_tokens(part) / _num_tokens(batch)
        shown = ("clip_low", "clip_high", "ratio", "old_kl_k3", "ref_kl")
        shown += ("sampling_weight", "sampling_clipped") if corrects else ()
        metrics = output.metrics._asdict()
        return output.loss, {name: metrics[name] * share for name in shown}

    def _update_critic(self, rollouts: list[Rollout], seed: int) -> list[dict[str, float]]:
        critic, config = self.critic, self.config.critic

        def loss(part: Sequence[Rollout], batch: Sequence[Rollout]):
            values = critic.values(critic.collate([r.group for r in part]))
            output = ops.value_loss(
                values,
                packed([r.returns for r in part], values.device),
                old_values=packed([r.values for r in part], values.device),
                clip=config.clip or None,
                cu_seqlens=offsets([r.group for r in part], values.device),
                normalizer=float(_num_tokens(batch)),
            )
            return output.loss, {}

        rows = fit(
            critic,
            rollouts,
            loss,
            sizes=[critic.num_tokens(r.group) for r in rollouts],
            config=replace(self.config.optimizer, learning_rate=config.learning_rate),
            seed=seed,
        )
        explained = explained_variance(
            packed([r.values for r in rollouts]).tolist(),
            packed([r.returns for r in rollouts]).tolist(),
        )
        return [{"value_loss": row["loss"], "explained_variance": explained} for row in rows]


def _without_greedy(group: ScoredGroup, advantage: str) -> tuple[ScoredGroup, float | None]:
    """The group without its greedy response, which is never trained, and that one's reward."""
    sampled = [i for i, c in enumerate(group.completions) if c.source != "greedy"]
    greedy = [r for c, r in zip(group.completions, group.rewards) if c.source == "greedy"]
    if advantage == "remax" and len(greedy) != 1:
        raise UserError(
            f"rl advantage remax needs one greedy response per prompt, got {len(greedy)} for "
            f"prompt {group.prompt.id!r}; use generation.sampler.kind greedy_extra"
        )
    kept = [group.completions[i] for i in sampled]
    trimmed = ScoredGroup(group.prompt, kept, [group.rewards[i] for i in sampled])
    return trimmed, statistics.fmean(greedy) if greedy else None


def _recorded(completion) -> list[float]:
    return completion.sampling_logps or [math.nan] * len(completion.token_ids)


def _num_tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(response) for r in rollouts for response in r.group.responses)


def _normalizer(loss_type: str, batch: Sequence[Rollout]) -> float:
    """What the loss of the whole batch is divided by, so that micro-batches add up to it."""
    aggregation = LOSS_TYPES[loss_type][1]
    if aggregation == "token-mean":
        return float(_num_tokens(batch))
    num_sequences = sum(len(r.group.responses) for r in batch)
    if aggregation == "seq-mean-token-sum-norm":
        longest = max(len(response) for r in batch for response in r.group.responses)
        return float(num_sequences * longest)
    return float(num_sequences)


def make_rl_policy(
    model: LanguageModel,
    reference: LanguageModel,
    tokenizer,
    *,
    config: RLConfig,
    critic_path: Path | str,
    seed: int,
    on_step,
) -> RLPolicy:
    """The policy with its critic, if it needs one, which starts from `critic_path`."""
    critic = None
    if config.advantage == "gae":
        critic = Critic.load(
            config.critic.model or critic_path,
            device=str(model.device),
            seed=seed,
            pad_token_id=model.pad_token_id,
            precision=model.precision,
            micro_batch_tokens=model.micro_batch_tokens,
        )
    return RLPolicy(model, reference, tokenizer, config=config, critic=critic, on_step=on_step)
