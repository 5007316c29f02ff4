"""Reward models from preferences: a head on frozen features, or the whole model.

Several outputs of the head make an ensemble on a shared decoder: each member learns from its own
random weighting of the pairs (Bayesian bootstrap), and the reward is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.losses.reward_model import smooth_labels
from rlhf_fast.models.adapters import LoraConfig
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.fit import FitOptions, OptimizerConfig, fit
from rlhf_fast.training.gating import GateConfig
from rlhf_fast.training.reward_head import fit_head, pair_features

Example = TypeVar("Example", bound=Any)  # with a `group`
Objective = Literal["pairs", "segments", "pairwise", "attributes", "quantiles", "rankings"]


@dataclass(frozen=True)
class RewardTrainingConfig:
    """Training of a reward model."""

    objective: Objective = "pairs"
    """pairs: Bradley-Terry. segments: the same of the mean reward of a response's segments (arXiv
    2501.02790). pairwise: a language model that answers which of two is better, A or B.
    From scored responses: attributes, one output per score; quantiles, several of one score;
    rankings, Plackett-Luce of all responses to a prompt (arXiv 2301.11270)."""
    num_outputs: int = 1
    """With pairs, members of an ensemble on one decoder (arXiv 2401.16635); with quantiles, their
    number."""
    members: Literal["heads", "adapters"] = "heads"
    """What the members of an ensemble have of their own: a head, or adapters with a head, each
    trained after the other on a decoder that stays as it is (arXiv 2401.00243)."""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """The adapters of such members."""
    parameters: Literal["head", "all"] = "all"
    """`all` fine-tunes the whole model; `head` fits a linear head on frozen features."""
    head_weight_decay: float = 0.1
    """L2 penalty on the head (of features scaled to unit variance) when only it is trained."""
    holdout_share: float = 0.1
    """Share of the prompts kept to measure how often responses are ordered right."""
    center_coefficient: float = 0.0
    """Weight of the mean of (r_chosen + r_rejected)^2, which holds rewards around zero
    (arXiv 2312.09244)."""
    label_smoothing: float = 0.0
    """Assumed share of flipped pairs (conservative Bradley-Terry, arXiv 2401.06080)."""
    label_update_rate: float = 0.0
    """Each time a pair is seen its label moves by this rate to what the model then believes
    (iterative data smoothing, arXiv 2401.16335)."""
    segments: Literal["entropy", "sentences"] = "entropy"
    """With objective segments, where they end: before tokens that the model to start from predicts
    with an entropy above `entropy_threshold`, or with sentences."""
    entropy_threshold: float = 2.0
    """See segments; in nats."""
    gate: GateConfig = field(default_factory=GateConfig)
    """With attributes, training of the gate that weighs them by the prompt (arXiv 2406.12845),
    where preference pairs are given beside the scores."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-6, batch_size=512, weight_decay=1e-3
        )
    )
    """Optimiser when the whole model is trained."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_share < 1:
            raise UserError(f"reward holdout_share must be in [0, 1), got {self.holdout_share}")
        if self.center_coefficient < 0:
            raise UserError(f"center_coefficient must be >= 0, got {self.center_coefficient}")
        if self.num_outputs < 1:
            raise UserError(f"num_outputs must be >= 1, got {self.num_outputs}")
        if not 0 <= self.label_smoothing < 0.5 or not 0 <= self.label_update_rate < 1:
            raise UserError(
                f"label_smoothing must be in [0, 0.5) and label_update_rate in [0, 1), "
                f"got {self.label_smoothing} and {self.label_update_rate}"
            )
        if self.members == "adapters" and (self.objective != "pairs" or self.parameters != "all"):
            raise UserError(
                f"members adapters are trained with objective pairs and parameters all, "
                f"got {self.objective} and {self.parameters}"
            )
        self._check_used()
        whole = self.objective != "pairs" or self.num_outputs > 1 or self.center_coefficient
        if self.parameters == "head" and (whole or self.label_update_rate):
            raise UserError(
                "parameters head fits one output to pairs, without centering or label updates; "
                "use parameters all"
            )

    def _check_used(self) -> None:
        """Refuses what the objective would leave aside in silence."""
        names: tuple[str, ...] = ()
        if self.objective not in ("pairs", "segments"):
            names = ("center_coefficient", "label_smoothing", "label_update_rate")
        given = [name for name in names if getattr(self, name)]
        if self.num_outputs > 1 and self.objective not in ("pairs", "segments", "quantiles"):
            given.append("num_outputs")
        if given:
            raise UserError(
                f"objective {self.objective} has no use for {given[0]}, "
                f"got {getattr(self, given[0])}; leave it at its default"
            )

    @property
    def head_outputs(self) -> int:
        """Outputs of one head."""
        return 1 if self.members == "adapters" else self.num_outputs


@dataclass(frozen=True)
class RewardPair:
    """A prompt with its chosen and its rejected response, and by how much the first is better."""

    group: TokenGroup
    margin: float = 0.0
    weights: tuple[float, ...] = ()
    """What the pair counts for each member of an ensemble; none: one each."""
    index: int = 0
    """Place of its label, where labels change."""


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[TokenGroup],
    *,
    config: RewardTrainingConfig,
    seed: int,
    margins: Sequence[float] | None = None,
    on_step: Callable[[dict[str, float], int], None] = lambda metrics, total: None,
    options: FitOptions | None = None,
) -> dict[str, float]:
    """Minimises `ops.reward_model_loss`; a group is (chosen, rejected).

    Pairs of one prompt stay together in training or hold-out. Returns pair accuracies.
    Source: arXiv 2405.07863, section 2.1; the margin is that of arXiv 2307.09288, equation 2.
    """
    margins = [0.0] * len(pairs) if margins is None else margins
    both = [RewardPair(group, margin) for group, margin in zip(pairs, margins, strict=True)]
    train, held_out = hold_out(both, config.holdout_share)
    if not train:
        raise UserError("no preference pair is left to train the reward model on")
    groups = [pair.group for pair in (*train, *held_out)]
    if config.parameters == "head":
        if model.num_outputs > 1:
            raise UserError(
                f"parameters head fits one output, got {model.num_outputs}; use parameters all"
            )
        features = pair_features(model, groups)
        fit_head(
            model,
            features[: len(train)],
            [pair.margin for pair in train],
            weight_decay=config.head_weight_decay,
            label_smoothing=config.label_smoothing,
        )
        difference = (features[:, 0] - features[:, 1]) @ model.head.weight[0].double()
    else:
        fit_them = _fit_adapters if config.members == "adapters" else _fit_all
        fit_them(model, train, config, seed, on_step, options)
        rewards = torch.tensor(model.map_responses(groups, model.rewards), dtype=torch.float32)
        difference = rewards[:, 0] - rewards[:, 1]
    correct = (difference > 0).double()
    return {
        "num_pairs": len(train),
        "num_held_out_pairs": len(held_out),
        "accuracy": correct[: len(train)].mean().item(),
        "held_out_accuracy": correct[len(train) :].mean().item(),  # NaN without held-out pairs
    }


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """To train on, and the last share of the prompts, each with all its examples."""
    prompts = list(dict.fromkeys(tuple(e.group.prompt_ids) for e in examples))
    held = set(prompts[len(prompts) - int(len(prompts) * share) :])
    train = [e for e in examples if tuple(e.group.prompt_ids) not in held]
    return train, [e for e in examples if tuple(e.group.prompt_ids) in held]


def _fit_all(
    model: RewardModel,
    pairs: Sequence[RewardPair],
    config: RewardTrainingConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None],
    options: FitOptions | None,
) -> None:
    num_members = model.head.out_features
    if num_members > 1:
        pairs = _bootstrap(pairs, num_members, seed)
    updates, labels = config.label_update_rate > 0, [1.0] * len(pairs)
    if updates:
        several = options and options.accelerator and options.accelerator.num_processes > 1
        if several or (options and options.checkpoints):
            raise UserError(
                "label_update_rate: the labels are those of one process, and not in checkpoints; "
                "train without"
            )
        pairs = [replace(pair, index=i) for i, pair in enumerate(pairs)]

    def each(values: list[float]) -> Tensor:
        """One value per pair and member."""
        return model.floats(values).repeat_interleave(num_members)

    def loss(
        part: Sequence[RewardPair], batch: Sequence[RewardPair]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        outputs = model.outputs(model.collate([pair.group for pair in part]))
        chosen, rejected = outputs.view(len(part), 2, num_members).unbind(1)  # [P, members]
        losses = ops.reward_model_loss(
            chosen.flatten(),
            rejected.flatten(),
            margins=each([pair.margin for pair in part]),
            targets=each([labels[p.index] for p in part]) if updates else None,
            label_smoothing=config.label_smoothing,
            center_weight=config.center_coefficient,
            reduction="none",
        ).loss.view(len(part), num_members)
        if part[0].weights:
            losses = losses * model.floats([p.weights for p in part])
        rewards = model.combine(outputs.detach()).view(-1, 2)
        totals = {
            "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).float().sum(),
            "reward_margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            "reward": rewards.mean(1).sum(),
        }
        if updates:
            old = model.floats([labels[p.index] for p in part])
            new = smooth_labels(old, *rewards.unbind(1), rate=config.label_update_rate)
            for pair, label in zip(part, new.tolist()):
                labels[pair.index] = label
        value = losses.mean(1).sum() / len(batch)
        return value, {name: total / len(batch) for name, total in totals.items()}

    fit(
        model,
        pairs,
        loss,
        sizes=[model.num_tokens(pair.group) for pair in pairs],
        config=config.optimizer,
        seed=seed,
        on_step=on_step,
        options=options,
    )


def _fit_adapters(
    model: RewardModel,
    pairs: Sequence[RewardPair],
    config: RewardTrainingConfig,
    seed: int,
    on_step: Callable[[dict[str, float], int], None],
    options: FitOptions | None,
) -> None:
    """One member after the other, from the same decoder."""
    if options and (options.checkpoints or options.accelerator):
        raise UserError("members adapters are trained by one process, without checkpoints")
    names = []
    weighted = _bootstrap(pairs, config.num_outputs, seed)
    for k in range(config.num_outputs):
        own = derive_seed(seed, "member", k)
        names.append(model.add_member(k + 1, config.adapter, seed=own))
        mine = [replace(pair, weights=pair.weights[k : k + 1]) for pair in weighted]
        _fit_all(model, mine, config, own, on_step, options)
    model.become_ensemble(names)


def _bootstrap(pairs: Sequence[RewardPair], num_members: int, seed: int) -> list[RewardPair]:
    """Exponential weights, mean 1: each member sees a random re-weighting of the data."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap"))
    weights = torch.empty(len(pairs), num_members, dtype=torch.float32).exponential_(
        generator=generator
    )
    return [
        RewardPair(pair.group, pair.margin, tuple(row))
        for pair, row in zip(pairs, weights.tolist())
    ]
