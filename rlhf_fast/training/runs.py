"""Stand-alone training: files in, a model directory out.

`run_sft`, `run_preference`, `run_unpaired`, `run_reward_model` and `run_pairwise_model` each take
one configuration and write one folder: `model/`, `metrics.jsonl`, `data.json` (what became of every
row), `run.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import AdapterConfig, add_lora
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.models.names import resolve_model
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.rows import RowOptions
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.lengths import LengthConfig
from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_preference
from rlhf_fast.training.reward import RewardTrainingConfig, hold_out, train_reward_model
from rlhf_fast.training.reward_regression import (
    RegressionConfig,
    accuracy,
    train_reward_regression,
)
from rlhf_fast.training.run_data import RunData
from rlhf_fast.training.session import ComputeConfig, OutputConfig, Session, weight_dtype
from rlhf_fast.training.sft import train_sft
from rlhf_fast.training.unpaired import UnpairedConfig, train_unpaired

Record = TypeVar("Record")
Flat = Annotated[Record, tyro.conf.arg(name="")]
"""On the command line its fields stand beside the others: `--device`, not `--compute.device`."""
Train = Callable[..., list[dict[str, float]]]
"""Trains a language model on data that it knows; returns metrics per step."""


@dataclass(frozen=True)
class RunConfig(RowOptions):
    """What every stand-alone training needs."""

    model: str = ""
    """Model to start from: a directory or a hub name, with a chat template."""
    data: str = ""
    """A .jsonl, .json, .csv or .parquet file, a saved or a hub dataset, or module:function."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """What happens to rows that are too long."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA: adapters instead of all weights."""
    compute: Flat[ComputeConfig] = field(default_factory=ComputeConfig)
    """How the model is computed."""
    output: Flat[OutputConfig] = field(default_factory=OutputConfig)
    """Where the results go."""
    seed: int = 0
    """Seed of everything random."""

    def check_complete(self) -> None:
        """Raises if a value without a default is missing."""
        for name in ("model", "data"):
            if not getattr(self, name):
                raise UserError(f"{name} is missing: give --{name}")


@dataclass(frozen=True)
class SFTRun(RunConfig):
    """Supervised fine-tuning on the assistant's turns."""

    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learned."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-5, batch_size=128)
    )
    """Optimiser."""


@dataclass(frozen=True)
class PreferenceRun(RunConfig):
    """DPO and its relatives on pairs of responses."""

    reference: str | None = None
    """Reference model; without one, the model as it is before training."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """Loss and optimiser."""


@dataclass(frozen=True)
class UnpairedRun(RunConfig):
    """KTO and its relatives on single responses, each labelled desirable or not."""

    reference: str | None = None
    """Reference model; without one, the model as it is before training."""
    unpaired: UnpairedConfig = field(default_factory=UnpairedConfig)
    """Loss and optimiser."""


@dataclass(frozen=True)
class RewardRun(RunConfig):
    """A reward model from pairs, or from scores."""

    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    """Objective and optimiser."""

    def __post_init__(self) -> None:
        where = {"pairwise": "run_pairwise_model", "segments": "the stage `rlhf-fast reward`"}
        if (objective := self.training.objective) in where:
            raise UserError(f"objective {objective} is trained by {where[objective]}")
        if self.training.members == "adapters" and (self.lora.rank or self.output.merge_adapters):
            raise UserError("members adapters take training.adapter, not lora or merge_adapters")


@dataclass(frozen=True)
class PairwiseRun(SFTRun):
    """A model that says which of two responses is better, by the token `A` or `B`."""


def run_sft(run: SFTRun) -> Path:
    """Fine-tunes a language model; returns the model's directory."""
    with _begun("sft", run) as (session, chat):
        groups = RunData(session, chat).conversations(every_turn=run.turns == "all")
        return _train_language_model(session, chat, groups)


def run_pairwise_model(run: PairwiseRun) -> Path:
    """Trains a pairwise preference model, every pair in both orders; returns its directory."""
    with _begun("pairwise", run) as (session, chat):
        return _train_language_model(session, chat, RunData(session, chat).comparisons())


def run_preference(run: PreferenceRun) -> Path:
    """Trains a policy on preference pairs; returns the model's directory."""

    def trainer(data: RunData) -> Train:
        pairs, margins = data.pairs()
        if run.dpo.soft_label_scale and not any(margins):
            raise UserError(
                f"{run.data}: dpo.soft_label_scale needs rows with `margin`, or `score_chosen` and "
                f"`score_rejected`, got none"
            )
        return partial(train_preference, pairs=pairs, gaps=margins, config=run.dpo)

    return _train_policy("preference", run, trainer, run.dpo.needs_reference)


def run_unpaired(run: UnpairedRun) -> Path:
    """Trains a policy on responses labelled desirable or not; returns the model's directory."""

    def trainer(data: RunData) -> Train:
        groups, labels = data.labelled()
        return partial(train_unpaired, groups=groups, labels=labels, config=run.unpaired)

    return _train_policy("unpaired", run, trainer)


def run_reward_model(run: RewardRun) -> Path:
    """Trains a reward model; returns the model's directory."""
    with _begun("reward model", run) as (session, chat):
        train = _reward_from_pairs if run.training.objective == "pairs" else _reward_from_scores
        num_outputs, fit = train(session, chat, run)
        session.announce_data()
        path, seed = resolve_model(run.model), derive_seed(run.seed, "new weights")
        dtype = weight_dtype(run)
        model = fresh_reward_model(path, num_outputs=num_outputs, dtype=dtype, seed=seed)
        if run.lora.rank:
            add_lora(model, run.lora, trained_modules=("score",), seed=seed)
        reward_model = RewardModel(
            model.to(session.device), chat.tokenizer, **run.compute.backbone_options()
        )
        rows = fit(reward_model)
        reward_model.mark_padding()
        save = reward_model.save if reward_model.members else None
        return session.finish(model, chat.tokenizer, rows, save)


FitReward = Callable[[RewardModel], list[dict[str, float]]]


def _reward_from_pairs(session: Session, chat: ChatFormat, run: RewardRun) -> tuple[int, FitReward]:
    pairs, margins = RunData(session, chat).pairs()

    def fit(model: RewardModel) -> list[dict[str, float]]:
        checkpoints = session.options.checkpoints
        rows = checkpoints.rows() if checkpoints else []

        def on_step(metrics: dict[str, float], total: int) -> None:
            rows.append(metrics)
            session.on_step(metrics, total)

        summary = train_reward_model(
            model,
            pairs,
            margins=margins,
            config=run.training,
            seed=derive_seed(run.seed, session.name),
            on_step=on_step,
            options=session.options,
        )
        return [*rows, summary]

    return run.training.head_outputs, fit


def _reward_from_scores(
    session: Session, chat: ChatFormat, run: RewardRun
) -> tuple[int, FitReward]:
    objective = run.training.objective
    examples, names = RunData(session, chat).scored(together=objective == "rankings")
    if objective != "attributes" and len(names) != 1:
        raise UserError(f"{run.data}: {objective} are of one score, got {names}")
    config = RegressionConfig(objective, run.training.optimizer)
    train, held_out = hold_out(examples, run.training.holdout_share)

    def fit(model: RewardModel) -> list[dict[str, float]]:
        model.model.config.reward_outputs = names
        rows = train_reward_regression(
            model,
            train,
            config=config,
            seed=derive_seed(run.seed, session.name),
            on_step=session.on_step,
            options=session.options,
        )
        summary = {
            "num_examples": len(train),
            "num_held_out_examples": len(held_out),
            "accuracy": accuracy(model, train, config),
            "held_out_accuracy": accuracy(model, held_out, config),
        }
        return [*rows, summary]

    return run.training.num_outputs if objective == "quantiles" else len(names), fit


@contextlib.contextmanager
def _begun(name: str, run: RunConfig) -> Iterator[tuple[Session, ChatFormat]]:
    run.check_complete()
    model_path = resolve_model(run.model)
    with Session(name, run) as session:
        yield session, ChatFormat(load_tokenizer(model_path))


def _train_language_model(session: Session, chat: ChatFormat, groups: Sequence[TokenGroup]) -> Path:
    run = session.run
    session.announce_data()
    model = _language_model(session, chat, resolve_model(run.model), run.lora)
    rows = train_sft(
        model,
        groups,
        config=run.optimizer,
        seed=derive_seed(run.seed, session.name),
        on_step=session.on_step,
        options=session.options,
    )
    return session.finish(model.model, chat.tokenizer, rows)


def _train_policy(
    name: str,
    run: PreferenceRun | UnpairedRun,
    trainer: Callable[[RunData], Train],
    needs_reference: bool = True,
) -> Path:
    reference_path = run.reference and resolve_model(run.reference, "reference")
    with _begun(name, run) as (session, chat):
        train = trainer(RunData(session, chat))
        session.announce_data()
        model = _language_model(session, chat, resolve_model(run.model), run.lora)
        reference = None
        if reference_path and needs_reference:
            reference = _language_model(session, chat, reference_path, AdapterConfig())
        rows = train(
            model,
            reference=reference,
            reference_cache=_beside(run.data, session.directory),
            seed=derive_seed(run.seed, session.name),
            on_step=session.on_step,
            options=session.options,
        )
        return session.finish(model.model, chat.tokenizer, rows)


def _language_model(
    session: Session, chat: ChatFormat, path: str, lora: AdapterConfig
) -> LanguageModel:
    model = load_causal_lm(path, dtype=weight_dtype(session.run)).to(session.device)
    if lora.rank:
        add_lora(model, lora, seed=derive_seed(session.run.seed, "new weights"))
    options = session.run.compute.backbone_options()
    return LanguageModel(model, pad_token_id=chat.end_token_id, **options)


def _beside(data: str, directory: Path) -> Path:
    """Where reference log-probabilities are kept: beside a file of data, else in the run.

    Beside data that is shared by many, nobody may write.
    """
    path = Path(data)
    place = path.with_name(f"{path.name}.reference")
    if path.exists() and os.access(place if place.exists() else place.parent, os.W_OK):
        return place
    return directory / f"reference-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
