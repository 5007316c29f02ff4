"""From rewards to one advantage per token, for every estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rlhf_fast import losses, ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.ops import sequences
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.rl_config import CovarianceConfig, RLConfig
from rlhf_fast.training.token_credit import outcome_advantages
from rlhf_fast.training.token_values import TokenValues, offsets, packed, unpacked


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
    token_scores: TokenValues | None = None
    """Of the token-level reward model, for oreal."""
    token_rewards: TokenValues | None = None
    """Shares of the rewards that a scorer gave to single tokens."""
    advantages: TokenValues = field(default_factory=list)
    returns: TokenValues = field(default_factory=list)
    penalised: TokenValues = field(default_factory=list)
    """1 for tokens that KL-Cov holds back, else 0."""
    finished: list[bool] = field(default_factory=list)
    """Whether the model ended the response itself."""
    entropies: TokenValues = field(default_factory=list)
    """Before the update, where tokens are chosen by them."""

    def only(self, kept: Sequence[int]) -> Rollout:
        """The same with these responses alone."""
        group = TokenGroup(self.group.prompt_ids, [self.group.responses[i] for i in kept])
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {n: [v[i] for i in kept] for n, v in rows.items() if isinstance(v, list) and v}
        return replace(self, group=group, **rows)


def with_advantages(
    rollouts: Sequence[Rollout], config: RLConfig, *, seed: int = 0
) -> list[Rollout]:
    """The rollouts with an advantage, and with GAE a return, for every token that is learned."""
    rollouts = _estimated(rollouts, config)
    if config.mask_unfinished:
        rollouts = _finished(rollouts)
    if config.high_entropy_share < 1:
        rollouts = _of_high_entropy(rollouts, config.high_entropy_share)
    return _against_covariance(rollouts, config.covariance, seed)


def _finished(rollouts: Sequence[Rollout]) -> list[Rollout]:
    kept = [[i for i, ended in enumerate(r.finished) if ended] for r in rollouts]
    if not any(kept):
        raise UserError(
            f"rl.mask_unfinished: the token limit cut all responses to {len(rollouts)} prompts; "
            f"raise generation.sampling.max_new_tokens"
        )
    return [rollout.only(places) for rollout, places in zip(rollouts, kept) if places]


def _of_high_entropy(rollouts: Sequence[Rollout], share: float) -> list[Rollout]:
    advantages, entropies = (
        packed([getattr(r, name) for r in rollouts])[None] for name in ("advantages", "entropies")
    )
    mask = torch.ones_like(entropies, dtype=torch.bool)
    kept = losses.keep_high_entropy(advantages, entropies, mask, share)[0]
    rows = unpacked(kept, [rollout.group for rollout in rollouts])
    return [replace(r, advantages=row) for r, row in zip(rollouts, rows)]


def _against_covariance(
    rollouts: list[Rollout], config: CovarianceConfig, seed: int
) -> list[Rollout]:
    if config.rule == "none":
        return rollouts
    names = ("advantages", "old_logps")
    tokens = [packed([getattr(r, name) for r in rollouts])[None] for name in names]
    tokens.append(torch.ones_like(tokens[0], dtype=torch.bool))
    if config.rule == "clip":
        values = losses.clip_cov_advantages(
            *tokens,
            share=config.share,
            low=config.low,
            high=config.high,
            generator=torch.Generator().manual_seed(derive_seed(seed, "covariance")),
        )
    else:
        values = losses.highest_covariances(*tokens, share=config.share).float()
    changed = "advantages" if config.rule == "clip" else "penalised"
    rows = unpacked(values[0], [rollout.group for rollout in rollouts])
    return [replace(r, **{changed: row}) for r, row in zip(rollouts, rows)]


def _estimated(rollouts: Sequence[Rollout], config: RLConfig) -> list[Rollout]:
    groups = [rollout.group for rollout in rollouts]
    if config.advantage in ("gae", "reinforce++"):
        advantages, returns = _token_advantages(rollouts, groups, config)
        rows = zip(unpacked(advantages, groups), unpacked(returns, groups))
        return [replace(r, advantages=a, returns=t) for r, (a, t) in zip(rollouts, rows)]
    if config.advantage == "oreal":
        return [
            replace(r, advantages=outcome_advantages(r.rewards, r.token_scores, config.outcome))
            for r in rollouts
        ]
    scalars = iter(_response_advantages(rollouts, config).tolist())
    return [
        replace(r, advantages=[[next(scalars)] * len(response) for response in r.group.responses])
        for r in rollouts
    ]


def _response_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> Tensor:
    """One advantage per response, in order."""
    penalised = [r for rollout in rollouts for r in _penalised(rollout, config)]
    rewards = torch.tensor(penalised, dtype=torch.float32)
    if config.advantage == "imitation":
        return torch.ones_like(rewards)
    if config.advantage == "constant":
        return rewards - config.reward_baseline
    counts = [len(rollout.rewards) for rollout in rollouts]
    if config.advantage == "remax":
        baselines = [b for r, n in zip(rollouts, counts) for b in [r.baseline] * n]
        return rewards - torch.tensor(baselines, dtype=torch.float32)
    lengths = torch.tensor([len(t) for r in rollouts for t in r.group.responses])
    is_whitened = config.advantage == "reinforce++_baseline"
    k = config.draws if config.advantage == "pass_at_k" else 1
    if k > 1 and min(counts) < k:
        raise UserError(
            f"rl.draws must be at most the responses to a prompt, got {k} and {min(counts)}; "
            "sample more, or draw fewer"
        )
    advantages = ops.group_advantages(
        rewards,
        estimator="dr_grpo" if is_whitened else config.advantage,
        cu_groups=torch.tensor([0, *counts]).cumsum(0),
        lengths=lengths.float() if config.advantage == "opo" else None,
        k=k,
    )
    return ops.whiten(advantages) if is_whitened else advantages


def _token_advantages(
    rollouts: Sequence[Rollout], groups: Sequence[TokenGroup], config: RLConfig
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of all tokens, packed; each bears its share of the reward and a KL."""
    cu_seqlens = offsets(groups)
    rewards = packed([_shares(rollout) for rollout in rollouts])
    if config.reward_kl_coef > 0:
        kl = packed([r.old_logps for r in rollouts]) - packed([r.ref_logps for r in rollouts])
        rewards -= config.reward_kl_coef * kl
    if config.advantage == "reinforce++":
        result = ops.gae(rewards, gamma=config.gamma, lam=1.0, cu_seqlens=cu_seqlens)
        return ops.whiten(result.returns), result.returns
    values = packed([r.values for r in rollouts])
    settings = {"gamma": config.gamma, "lam": config.lam, "cu_seqlens": cu_seqlens}
    if config.num_steps:
        index, inside = sequences.padded(rewards, cu_seqlens)
        steps = {"num_steps": config.num_steps, "gamma": config.gamma}
        returns = losses.n_step_returns(rewards[index], values[index], inside, **steps)[inside]
        result = ops.GaeOutput(returns - values, returns)
    elif config.macro_tokens > 1:
        lengths = cu_seqlens.diff().tolist()
        at = torch.cat([torch.arange(length) for length in lengths])
        result = ops.macro_gae(rewards, values, at % config.macro_tokens == 0, **settings)
    else:
        result = ops.gae(rewards, values, **settings)
    advantages = ops.whiten(result.advantages) if config.whiten else result.advantages
    return advantages, result.returns


def _shares(rollout: Rollout) -> TokenValues:
    """Each token's share of its response's reward; the last one takes what no scorer gave out."""
    rows = rollout.token_rewards or [[0.0] * len(response) for response in rollout.group.responses]
    return [[*row[:-1], reward - sum(row[:-1])] for reward, row in zip(rollout.rewards, rows)]


def _penalised(rollout: Rollout, config: RLConfig) -> list[float]:
    """Rewards minus the KL of each whole response."""
    if config.reward_kl_coef == 0:
        return rollout.rewards
    return [
        reward - config.reward_kl_coef * (sum(old) - sum(ref))
        for reward, old, ref in zip(rollout.rewards, rollout.old_logps, rollout.ref_logps)
    ]
