"""Training of a policy on preference pairs, with the reference computed once per data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.losses import wpo_weights
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.ops.preference_inputs import TRAITS
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit
from rlhf_fast.training.reference import reference_logps
from rlhf_fast.types import PreferencePair

OnStep = Callable[[dict[str, float], int], None]
WITHOUT_REFERENCE = ("cpo", "simpo", "slic", "orpo")
MEASURED = tuple(name for name, traits in TRAITS.items() if "baseline" in traits)
"""Losses that compare with a number of the whole batch: training/unpaired.py has it."""
# aot sorts a whole batch, sft divides by its tokens, bradley_terry compares rewards
OTHER_TASKS = ("aot", "aot_unpaired", "sft", "bradley_terry", *MEASURED)
LossType = Literal[
    tuple(name for name in ops.PREFERENCE_LOSSES if name not in OTHER_TASKS)  # type: ignore
]


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation of the policy, or one of its relatives."""

    loss_type: LossType = "sigmoid"
    """The loss: `sigmoid` is DPO; formulas and sources are in csrc/math/preference.h."""
    beta: float = 0.1
    """Strength of the tie to the reference model."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences (conservative DPO, robust, exo_pair)."""
    nll_weight: float = 0.0
    """Weight of the chosen response's mean negative log-probability per token (arXiv 2404.19733,
    equation 2); keeps the chosen responses, and their ends, likely while the gap grows."""
    margin: float = 0.0
    """Subtracted from the scaled difference: SimPO's gamma, SLiC's delta."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Divergence that ties the policy to the reference (arXiv 2309.16240)."""
    alpha: float = 0.5
    """Of the alpha-divergence."""
    dpop_penalty: float = 0.0
    """DPO-Positive's lambda."""
    previous_share: float = 0.0
    """Share in the reference's log-probabilities of the policy as it enters the update. INPO (arXiv
    2407.00617) is ipo_sum with beta = eta and previous_share = 1 - tau / eta."""
    exploration: float = 0.0
    """Weight of the log-probability of a pair's response that the reference sampled, which is made
    less likely: XPO's alpha (arXiv 2405.21046), with selection.rule policy_vs_reference."""
    bias: float = 1.0
    """Of cpo: factor on the rejected response's log-probability; below 1 keeps the policy on the
    data. CPL (arXiv 2310.13639) is cpo with beta its alpha and bias its lambda."""
    weigh_by_policy: bool = False
    """Weighs each pair by how likely the policy is to have said it, at most 1: WPO (arXiv
    2406.11827)."""
    soft_label_scale: float = 0.0
    """Above 0 the chosen response wins with probability sigmoid(scale * gap) only, its gap being by
    how much its reward, or a row's `margin`, is greater: OSP (arXiv 2405.14103). 1 takes the
    rewards of a Bradley-Terry model at their word."""
    length_penalty: float = 0.0
    """Reward that a token costs, in units of the loss's own: with sigmoid the alpha of R-DPO (arXiv
    2403.19159), whose pairs with a longer chosen response then teach less."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-7, num_epochs=2, batch_size=128)
    )
    """Optimiser; a fresh one in every iteration."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"dpo.beta must be > 0, got {self.beta}")
        if self.loss_type in MEASURED:
            raise UserError(
                f"dpo.loss_type {self.loss_type} has a baseline over the batch, which pairs are "
                f"not given: take algorithm unpaired with unpaired.loss_type {self.loss_type}, or "
                f"`python -m rlhf_fast.training unpaired`, which learns from pairs too"
            )
        if self.loss_type not in ops.PREFERENCE_LOSSES or self.loss_type in OTHER_TASKS:
            raise UserError(
                f"dpo.loss_type must be one of {', '.join(LossType.__args__)}, "
                f"got {self.loss_type!r}"
            )
        for name in ("nll_weight", "exploration", "soft_label_scale", "length_penalty"):
            if getattr(self, name) < 0:
                raise UserError(f"dpo.{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.previous_share <= 1 or (self.previous_share and not self.needs_reference):
            raise UserError(
                f"dpo.previous_share must be in [0, 1], and 0 with a loss without reference, got "
                f"{self.previous_share} with {self.loss_type}"
            )
        if not 0 < self.bias <= 1 or (self.bias < 1 and self.loss_type != "cpo"):
            raise UserError(
                f"dpo.bias must be in (0, 1], and 1 with losses other than cpo, got {self.bias} "
                f"with {self.loss_type}"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        try:
            self.check()
        except ValueError as error:  # a setting that the loss does not know
            raise UserError(f"dpo: {error}") from error

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in WITHOUT_REFERENCE

    @property
    def is_one_pass(self) -> bool:
        """Whether the pair's two sums are all that matters to its gradient."""
        return not (self.weigh_by_policy or self.exploration or self.bias < 1)

    @property
    def loss_options(self) -> dict[str, Any]:
        """What `ops.preference_loss` and `ops.linear_preference_loss` take of these settings."""
        names = {f.name for f in fields(ops.PreferenceParams)}
        params = {name: value for name, value in vars(self).items() if name in names}
        params = ops.PreferenceParams(**params)
        return {"loss_type": self.loss_type, "beta": self.beta, "params": params}

    def check(self) -> None:
        one = torch.zeros(1, dtype=torch.float32)
        logps = [one] * (4 if self.needs_reference else 2)
        given = {"targets": self.soft_label_scale, "margins": self.length_penalty}
        data = ops.PairData(one, one, **{name: one for name, is_used in given.items() if is_used})
        ops.preference_loss(*logps, data=data, **self.loss_options)


@dataclass(frozen=True)
class _Example:
    group: TokenGroup
    explored: int | None  # which of the two the exploration bonus is for
    target: float | None  # probability that the chosen one wins
    # Chosen, rejected. Computed anew they differ by rounding, so they tell no data apart.
    ref_logps: list[float] | None = field(repr=False)


def train_dpo(
    policy: LanguageModel,
    reference: LanguageModel | None,
    pairs: Sequence[PreferencePair],
    *,
    config: DPOConfig,
    seed: int,
    on_step: OnStep = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> list[dict[str, float]]:
    """One round of DPO (arXiv 2305.18290) on sampled pairs; returns metrics per optimiser step.

    The sampled token ids are trained as they are. Without `reference` it is the policy as it
    comes in.
    """
    groups = [
        TokenGroup(p.chosen.prompt_token_ids, [p.chosen.token_ids, p.rejected.token_ids])
        for p in pairs
    ]
    return train_preference(
        policy,
        groups,
        reference=reference,
        config=config,
        seed=seed,
        explored=[_sampled_by_reference(pair) for pair in pairs] if config.exploration else None,
        gaps=[pair.chosen_reward - pair.rejected_reward for pair in pairs],
        on_step=on_step,
        options=options,
    )


def _sampled_by_reference(pair: PreferencePair) -> int:
    """0: the chosen response, 1: the rejected one."""
    sources = [c.source == "reference" for c in (pair.chosen, pair.rejected)]
    if sum(sources) != 1:
        raise UserError(
            f"dpo.exploration needs pairs of a response of the policy and one of the reference, "
            f"got {pair.chosen.source} and {pair.rejected.source}; use generation.sampler.kind "
            f"mixture with strength 1 and selection.rule policy_vs_reference"
        )
    return sources.index(True)


def train_preference(
    policy: LanguageModel,
    pairs: Sequence[TokenGroup],
    *,
    config: DPOConfig,
    seed: int,
    reference: LanguageModel | None = None,
    reference_cache: Path | None = None,
    explored: Sequence[int] | None = None,
    gaps: Sequence[float] | None = None,
    on_step: OnStep = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> list[dict[str, float]]:
    """Trains on pairs, each a group (chosen, rejected); returns metrics per optimiser step.

    Chosen and rejected share their prompt's computation; `reference` runs once over all pairs and
    never inside a step. Without one, or with one of the policy's own model, it is the policy as it
    comes in, without its adapters if it has any. `reference_cache` is a directory that keeps the
    reference's log-probabilities. `explored` says for each pair whether config.exploration is for
    its chosen (0) or rejected (1); `gaps` says how much better the chosen one is, for
    config.soft_label_scale.
    """
    options = options or FitOptions()
    ref_logps: Sequence[list[float] | None] = [None] * len(pairs)
    if config.needs_reference:
        ref_logps = reference_logps(
            reference or policy,
            pairs,
            cache=reference_cache,
            with_adapters=reference is not None and reference.model is not policy.model,
            accelerator=options.accelerator,
        )
    if config.previous_share:
        previous = reference_logps(
            policy, pairs, with_adapters=True, accelerator=options.accelerator
        )
        ref_logps = _mixed(ref_logps, previous, config.previous_share)
    nothing, targets = [None] * len(pairs), None
    if config.soft_label_scale:
        targets = torch.tensor(gaps).mul(config.soft_label_scale).sigmoid().tolist()
    examples = list(map(_Example, pairs, explored or nothing, targets or nothing, ref_logps))

    def loss(
        part: Sequence[_Example], batch: Sequence[_Example]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        tokens = policy.collate([e.group for e in part])
        hidden = policy.states(tokens, tokens.source)
        references: tuple[Tensor, ...] = ()
        if config.needs_reference:
            table = policy.floats([e.ref_logps for e in part])
            references = table.unbind(1)
        data = ops.PairData()
        if config.soft_label_scale:
            data = ops.PairData(targets=policy.floats([e.target for e in part]))
        if config.length_penalty:
            chosen, rejected = tokens.cu_seqlens.diff().float().view(-1, 2).unbind(1)
            data = data._replace(margins=config.length_penalty * (rejected - chosen))
        if config.is_one_pass:
            result = policy.preference_loss(
                hidden, tokens, *references, data=data, num_pairs=len(batch), **config.loss_options
            )
            totals: dict[str, Tensor] = {}
        else:
            places = [e.explored for e in part] if config.exploration else None
            result, totals = _two_passes(policy, hidden, tokens, references, config, data, places)
            result = result._replace(loss=result.loss / len(batch))
        totals |= {
            "reward_accuracy": result.pairs.accuracies.sum(),
            "reward_margin": result.pairs.margins.sum(),
            "chosen_logps": result.chosen_logps.sum(),
            "rejected_logps": result.rejected_logps.sum(),
            "chosen_nll": -(result.chosen_logps / tokens.cu_seqlens.diff()[0::2]).sum(),
        }
        return result.loss, {name: total / len(batch) for name, total in totals.items()}

    return fit(
        policy,
        examples,
        loss,
        sizes=[policy.num_tokens(group) for group in pairs],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
    )


def _mixed(
    ref_logps: Sequence[list[float]], previous: Sequence[list[float]], share: float
) -> list[list[float]]:
    return [
        [(1 - share) * r + share * p for r, p in zip(*rows)] for rows in zip(ref_logps, previous)
    ]


def _two_passes(
    policy: LanguageModel,
    hidden: Tensor,
    tokens: GroupBatch,
    references: Sequence[Tensor],
    config: DPOConfig,
    data: ops.PairData,
    explored: list[int] | None,
) -> tuple[ops.LinearPreferenceOutput, dict[str, Tensor]]:
    """Log-probabilities first, for losses that need more than the sums of a pair's responses.

    The loss is the sum over the pairs.
    """
    outputs = ("logps", "sum_p2") if config.weigh_by_policy else ("logps",)
    head = policy.head_outputs(hidden, tokens.labels, outputs)
    logps = ops.segment_sum(head.logps, cu_seqlens=tokens.cu_seqlens).view(-1, 2)
    chosen, rejected = tokens.cu_seqlens.diff().float().view(-1, 2).unbind(1)
    data = data._replace(chosen_lengths=chosen, rejected_lengths=rejected)
    totals = {}
    if config.weigh_by_policy:
        weights = wpo_weights(head.logps, head.sum_p2.log(), cu_seqlens=tokens.cu_seqlens)
        data = data._replace(weights=weights.view(-1, 2).prod(1).clamp(max=1))
        totals["pair_weight"] = data.weights.sum()
    chosen, rejected = logps.unbind(1)
    pairs = ops.preference_loss(
        chosen,
        config.bias * rejected,
        *references,
        data=data,
        reduction="none",
        **config.loss_options,
    )
    value = pairs.loss.sum()
    if explored is not None:
        places = torch.tensor(explored, device=logps.device)
        value = value + config.exploration * logps.gather(1, places[:, None]).sum()
    seen = logps.detach().unbind(1)
    return ops.LinearPreferenceOutput(value, *seen, pairs), totals
