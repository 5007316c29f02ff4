"""On-policy RL: policy-gradient updates from sampled responses and their rewards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import losses, ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.models.checkpoint import load_weights, save_model
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.ops.policy_params import LOSS_TYPES
from rlhf_fast.training.advantages import Rollout, with_advantages
from rlhf_fast.training.critic import Critic, explained_variance
from rlhf_fast.training.fit import FitOptions, fit
from rlhf_fast.training.policy import ReferencedPolicy, whole
from rlhf_fast.training.rl_config import DIVIDED, RLConfig
from rlhf_fast.training.token_credit import TokenCredit, fit_token_credit
from rlhf_fast.training.token_values import TokenValues, offsets, packed, token_values
from rlhf_fast.types import ScoredGroup


class RLPolicy(ReferencedPolicy):
    """Trains `model` by policy gradients on scored responses.

    GAE asks for a critic, OREAL for a token-level reward model; they learn in every update too.

    Log-probabilities before the update are computed by the trainer, so the first step's ratios are
    exactly 1; those that the sampler recorded correct for its rounding and age. All are of the
    policy at the temperature that it is sampled with.
    """

    def __init__(
        self,
        *models,
        config: RLConfig,
        critic: Critic | None = None,
        credit: TokenCredit | None = None,
        **options,
    ) -> None:
        super().__init__(*models, **options)
        self.config = config
        self.temperature = config.temperature or 1.0
        self.critic = critic
        self.credit = credit
        if (config.advantage == "gae") != (critic is not None):
            raise UserError("rl: a critic goes with advantage gae")
        if (config.advantage == "oreal") != (credit is not None):
            raise UserError("rl: a token-level reward model goes with advantage oreal")
        named = {"critic": critic, "token_credit": credit}
        self.companions = {name: model for name, model in named.items() if model is not None}

    def _train(self, groups: Sequence[ScoredGroup], seed: int) -> list[dict[str, float]]:
        rollouts = self._rollouts(groups)
        extra_rows: list[dict[str, float]] = []
        if self.credit is not None:
            rollouts, extra_rows = self._with_token_scores(rollouts, seed)
        rollouts = with_advantages(rollouts, self.config, seed=seed)
        rows = fit(
            self.model,
            rollouts,
            self._loss,
            sizes=[self.model.num_tokens(r.group) for r in rollouts],
            config=self.config.optimizer,
            seed=seed,
            on_step=self.on_step,
            options=self.options,
        )
        if self.critic is not None:
            extra_rows = self._update_critic(rollouts, seed)
        return [row | extra for row, extra in zip(rows, extra_rows)] if extra_rows else rows

    def save(self, path: Path, **options) -> None:
        for name, companion in self.companions.items():
            save_model(path.parent / name, companion.model, self.tokenizer)
        super().save(path, **options)

    def load(self, path: Path) -> None:
        super().load(path)
        for name, companion in self.companions.items():
            load_weights(path.parent / name, companion.model)

    def _rollouts(self, groups: Sequence[ScoredGroup]) -> list[Rollout]:
        needs_reference = self.config.kl_coef > 0 or self.config.reward_kl_coef > 0
        sampled = [_without_greedy(group, self.config.advantage) for group in groups]
        tokens = [
            TokenGroup(g.completions[0].prompt_token_ids, [c.token_ids for c in g.completions])
            for g, _ in sampled
        ]
        old = self._logps_of(self.model, tokens)
        sampler = [[_recorded(c) for c in g.completions] for g, _ in sampled]
        if self.temperature != 1.0 and self.config.sampling_correction != "none":
            # What the sampler did otherwise is known at temperature 1.
            sampler = _moved(sampler, old, token_values(self.model, tokens, self.model.token_logps))
        nothing = [None] * len(tokens)
        ref = nothing
        if needs_reference:
            with self.as_reference():
                ref = self._logps_of(self.reference, tokens)
        entropies = [[] for _ in tokens]
        if self.config.high_entropy_share < 1:
            entropies = token_values(self.model, tokens, self._entropies)
        values = nothing
        if self.critic is not None:
            values = token_values(self.critic, tokens, self.critic.values)
        return [
            Rollout(
                group,
                g.rewards,
                o,
                s,
                r,
                baseline,
                values=v,
                token_rewards=g.token_rewards,
                finished=[c.finished for c in g.completions],
                entropies=e,
            )
            for group, (g, baseline), o, s, r, v, e in zip(
                tokens, sampled, old, sampler, ref, values, entropies
            )
        ]

    def _logps_of(self, model: LanguageModel, tokens: Sequence[TokenGroup]) -> list[TokenValues]:
        def logps(batch: GroupBatch) -> Tensor:
            hidden = model.states(batch, batch.source)
            return model.head_outputs(hidden, batch.labels, temperature=self.temperature).logps

        return token_values(model, tokens, logps)

    def _entropies(self, batch: GroupBatch) -> Tensor:
        hidden, options = self.model.states(batch, batch.source), {"temperature": self.temperature}
        return self.model.head_outputs(hidden, batch.labels, ("entropy",), **options).entropy

    def _with_token_scores(
        self, rollouts: list[Rollout], seed: int
    ) -> tuple[list[Rollout], list[dict[str, float]]]:
        """Teaches the token-level reward model these outcomes, then reads it."""
        outcome, tokens = self.config.outcome, [r.group for r in rollouts]
        is_right = [[x >= outcome.right_reward for x in r.rewards] for r in rollouts]
        config = replace(self.config.optimizer, learning_rate=outcome.learning_rate)
        settings = {"config": config, "seed": seed, "options": self.options}
        rows = fit_token_credit(self.credit, tokens, is_right, **settings)
        self.credit = self.companions["token_credit"] = whole(self.credit)
        scores = token_values(self.credit, tokens, self.credit.scores)
        return (
            [replace(r, token_scores=s) for r, s in zip(rollouts, scores)],
            [{"credit_loss": r["loss"], "credit_accuracy": r["accuracy"]} for r in rows],
        )

    def _loss(
        self, part: Sequence[Rollout], batch: Sequence[Rollout]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, config = self.model.collate([rollout.group for rollout in part]), self.config
        corrects = config.sampling_correction != "none"

        def given(name: str) -> Tensor:
            return packed([getattr(rollout, name) for rollout in part], self.model.device)

        hidden = self.model.states(tokens, tokens.source)
        options = {
            "loss_type": config.loss_type,
            "params": config.params(),
            "ref_logps": given("ref_logps") if config.kl_coef > 0 else None,
            "sampling_logps": given("sampling_logps") if corrects else None,
            "normalizer": _normalizer(config, batch),
        }
        if config.is_one_pass:
            known = given("old_logps"), given("advantages")
            options |= {"temperature": self.temperature}
            output = self.model.policy_loss(hidden, tokens, *known, **options)
        else:
            output = self._two_passes(hidden, tokens, given, options, _num_tokens(batch))
        share = _num_tokens(part) / _num_tokens(batch)
        shown = ("clip_low", "clip_high", "ratio", "old_kl_k3")
        shown += ("ref_kl",) if config.kl_coef > 0 else ()
        shown += ("sampling_weight", "sampling_clipped") if corrects else ()
        metrics = output.metrics._asdict()
        rows = {name: metrics[name] * share for name in shown}
        return output.loss, rows | {"policy_entropy": metrics["entropy"] * share}

    def _two_passes(
        self,
        hidden: Tensor,
        tokens: GroupBatch,
        given: Callable[[str], Tensor],
        options: dict[str, Any],
        num_tokens: int,
    ) -> ops.PolicyLossOutput:
        """Log-probabilities first, where they decide on whole responses or are penalised."""
        config, old_logps, advantages = self.config, given("old_logps"), given("advantages")
        head = self.model.head_outputs(
            hidden, tokens.labels, ("logps", "entropy"), self.temperature
        )
        if config.off_policy_threshold is not None:
            sampled = given("sampling_logps")
            advantages = losses.mask_off_policy_sequences(
                advantages,
                head.logps,
                torch.where(sampled.isnan(), old_logps, sampled),
                cu_seqlens=tokens.cu_seqlens,
                threshold=config.off_policy_threshold,
            )
        output = ops.policy_loss(
            head.logps,
            old_logps,
            advantages,
            cu_seqlens=tokens.cu_seqlens,
            entropy=head.entropy if config.entropy_coef else head.entropy.detach(),
            **options,
        )
        if config.covariance.rule == "kl":
            change = (head.logps - old_logps).abs() * given("penalised")
            penalty = config.covariance.kl_coef * change.sum() / num_tokens
            output = output._replace(loss=output.loss + penalty)
        return output

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
            options=self.options,
        )
        self.critic = self.companions["critic"] = whole(critic)
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
    if not sampled:
        raise UserError(
            f"rl: prompt {group.prompt.id!r} has nothing but its greedy response, which is never "
            f"trained; take a selection.rule that keeps others"
        )
    kept = [group.completions[i] for i in sampled]
    shares = group.token_rewards and [group.token_rewards[i] for i in sampled]
    rewards = [group.rewards[i] for i in sampled]
    trimmed = ScoredGroup(group.prompt, kept, rewards, token_rewards=shares)
    return trimmed, statistics.fmean(greedy) if greedy else None


def _moved(
    values: Sequence[TokenValues], to: Sequence[TokenValues], since: Sequence[TokenValues]
) -> list[TokenValues]:
    """values + to - since, token by token."""
    return [
        [[v + t - s for v, t, s in zip(*row)] for row in zip(*rows)]
        for rows in zip(values, to, since)
    ]


def _recorded(completion) -> list[float]:
    return completion.sampling_logps or [math.nan] * len(completion.token_ids)


def _num_tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(response) for r in rollouts for response in r.group.responses)


def _normalizer(config: RLConfig, batch: Sequence[Rollout]) -> float:
    """What the loss of the whole batch is divided by, so that micro-batches add up to it."""
    aggregation = LOSS_TYPES[config.loss_type][1]
    if aggregation == "token-mean":
        return float(_num_tokens(batch))
    num_sequences = sum(len(r.group.responses) for r in batch)
    if aggregation == DIVIDED:
        longest = max(len(response) for r in batch for response in r.group.responses)
        return float(num_sequences * (config.max_length or longest))
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
    options: FitOptions = FitOptions(),  # noqa: B008, frozen
) -> RLPolicy:
    """The policy with its critic or token-level reward model, which start from `critic_path`."""
    settings = {"device": str(model.device), **model.settings}
    companion = {}
    if config.advantage == "gae":
        companion["critic"] = Critic.load(config.critic.model or critic_path, seed=seed, **settings)
    if config.advantage == "oreal":
        companion["credit"] = TokenCredit.load(critic_path, **settings)
    shared = {"config": config, "on_step": on_step, "options": options}
    return RLPolicy(model, reference, tokenizer, **shared, **companion)
