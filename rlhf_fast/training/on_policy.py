"""On-policy RL: policy-gradient updates from sampled responses and their rewards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.checkpoint import load_weights, save_model
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.ops.policy_params import LOSS_TYPES
from rlhf_fast.training.critic import Critic, CriticConfig, explained_variance, value_loss
from rlhf_fast.training.fit import OptimizerConfig, fit
from rlhf_fast.training.policy import ReferencedPolicy
from rlhf_fast.training.token_values import TokenValues, offsets, packed, token_values, unpacked
from rlhf_fast.types import ScoredGroup

LossType = Literal[tuple(LOSS_TYPES)]  # type: ignore
GroupEstimator = Literal["grpo", "dr_grpo", "rloo", "maxrl", "opo", "best", "rank"]
Estimator = (
    GroupEstimator | Literal["reinforce++", "reinforce++_baseline", "remax", "gae", "imitation"]
)


@dataclass(frozen=True)
class RLConfig:
    """Policy-gradient updates: which loss, which advantage, which ties."""

    loss_type: LossType = "grpo"
    """The loss; formulas and sources: `ops.policy_loss`."""
    advantage: Estimator = "grpo"
    """Of groups: `ops.group_advantages`. reinforce++: whitened returns (arXiv 2501.03262);
    reinforce++_baseline: reward minus the group's mean, whitened. remax: minus the reward of the
    greedy response (arXiv 2310.10505). gae: with a critic (arXiv 1506.02438). imitation: 1, so
    that `reinforce` is the likelihood of what was selected (with kl_coef: SuperHF, arXiv
    2310.16763)."""
    epsilon_low: float = 0.2
    """The probability ratio is cut off below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """And above 1 + epsilon_high."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated."""
    reward_kl_coef: float = 0.0
    """Weight of the KL to the reference in the reward of every token; with an advantage of groups,
    of the whole response."""
    sampling_correction: Literal["none", "truncate", "mask"] = "truncate"
    """Weighs tokens by trainer / sampler probability, within `sampling_high`: the engine that
    sampled rounds differently, and with `overlap` it is one update older. The sampler's
    probabilities are those at temperature 1."""
    sampling_high: float = 2.0
    """Bound of that weight."""
    gamma: float = 1.0
    """Discount per token, for reinforce++ and gae."""
    lam: float = 0.95
    """Trace decay of gae."""
    macro_tokens: int = 1
    """Above 1, gae decides, values and credits runs of this many tokens as one (MA-RLHF, arXiv
    2410.02743)."""
    whiten: bool = True
    """Whitens the advantages of gae over all tokens of the update."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value model of gae."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6, batch_size=64)
    )
    """Optimiser; its batches count prompts, its epochs pass over the same samples."""

    def __post_init__(self) -> None:
        for name in ("kl_coef", "reward_kl_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"rl.{name} must be >= 0, got {getattr(self, name)}")
        if self.macro_tokens < 1:
            raise UserError(f"rl.macro_tokens must be >= 1, got {self.macro_tokens}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"rl.{name} must be in [0, 1], got {getattr(self, name)}")
        try:
            self.params()
        except ValueError as error:
            raise UserError(f"rl: {error}") from error

    def params(self) -> ops.PolicyLossParams:
        corrects = self.sampling_correction != "none"
        return ops.PolicyLossParams(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            sampling_correction=self.sampling_correction if corrects else "truncate",
            sampling_high=self.sampling_high,
        )


@dataclass(frozen=True)
class Rollout:
    """One prompt's responses with what the update needs of every token."""

    group: TokenGroup
    rewards: list[float]
    old_logps: TokenValues
    sampling_logps: TokenValues
    """NaN where the sampler reported none."""
    ref_logps: TokenValues | None
    baseline: float | None
    """Reward of the greedy response, for remax."""
    values: TokenValues | None = None
    advantages: TokenValues = field(default_factory=list)
    returns: TokenValues = field(default_factory=list)


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
        output = ops.policy_loss(
            logps,
            packed([r.old_logps for r in part], device),
            packed([r.advantages for r in part], device),
            cu_seqlens=offsets(groups, device),
            loss_type=self.config.loss_type,
            params=self.config.params(),
            ref_logps=packed([r.ref_logps for r in part], device)
            if self.config.kl_coef > 0
            else None,
            sampling_logps=packed([r.sampling_logps for r in part], device) if corrects else None,
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
            old = packed([r.values for r in part], values.device)
            returns = packed([r.returns for r in part], values.device)
            return value_loss(values, old, returns, clip=config.clip) / _num_tokens(batch), {}

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


def with_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> list[Rollout]:
    """The rollouts with an advantage, and with GAE a return, for every token."""
    groups = [rollout.group for rollout in rollouts]
    if config.advantage in ("gae", "reinforce++"):
        advantages, returns = _token_advantages(rollouts, groups, config)
        rows = zip(unpacked(advantages, groups), unpacked(returns, groups))
        return [replace(r, advantages=a, returns=t) for r, (a, t) in zip(rollouts, rows)]
    scalars = iter(_response_advantages(rollouts, config).tolist())
    return [
        replace(r, advantages=[[next(scalars)] * len(response) for response in r.group.responses])
        for r in rollouts
    ]


def _response_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> Tensor:
    """One advantage per response, in order."""
    rewards = torch.tensor([r for rollout in rollouts for r in _penalised(rollout, config)])
    if config.advantage == "imitation":
        return torch.ones_like(rewards)
    counts = [len(rollout.rewards) for rollout in rollouts]
    if config.advantage == "remax":
        baselines = [b for r, n in zip(rollouts, counts) for b in [r.baseline] * n]
        return rewards - torch.tensor(baselines)
    lengths = torch.tensor([len(t) for r in rollouts for t in r.group.responses])
    is_whitened = config.advantage == "reinforce++_baseline"
    advantages = ops.group_advantages(
        rewards,
        estimator="dr_grpo" if is_whitened else config.advantage,
        cu_groups=torch.tensor([0, *counts]).cumsum(0),
        lengths=lengths.float() if config.advantage == "opo" else None,
    )
    return ops.whiten(advantages) if is_whitened else advantages


def _token_advantages(
    rollouts: Sequence[Rollout], groups: Sequence[TokenGroup], config: RLConfig
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of all tokens, packed; the reward comes at the end, a KL at each."""
    cu_seqlens = offsets(groups)
    rewards = torch.zeros(int(cu_seqlens[-1]))
    if config.reward_kl_coef > 0:
        kl = packed([r.old_logps for r in rollouts]) - packed([r.ref_logps for r in rollouts])
        rewards -= config.reward_kl_coef * kl
    rewards[cu_seqlens[1:] - 1] += torch.tensor([x for r in rollouts for x in r.rewards])
    if config.advantage == "reinforce++":
        result = ops.gae(rewards, gamma=config.gamma, lam=1.0, cu_seqlens=cu_seqlens)
        return ops.whiten(result.returns), result.returns
    values = packed([r.values for r in rollouts])
    settings = {"gamma": config.gamma, "lam": config.lam, "cu_seqlens": cu_seqlens}
    if config.macro_tokens > 1:
        lengths = cu_seqlens.diff().tolist()
        at = torch.cat([torch.arange(length) for length in lengths])
        result = ops.macro_gae(rewards, values, at % config.macro_tokens == 0, **settings)
    else:
        result = ops.gae(rewards, values, **settings)
    advantages = ops.whiten(result.advantages) if config.whiten else result.advantages
    return advantages, result.returns


def _penalised(rollout: Rollout, config: RLConfig) -> list[float]:
    """Rewards minus the KL of each whole response."""
    if config.reward_kl_coef == 0:
        return rollout.rewards
    return [
        reward - config.reward_kl_coef * (sum(old) - sum(ref))
        for reward, old, ref in zip(rollout.rewards, rollout.old_logps, rollout.ref_logps)
    ]


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
