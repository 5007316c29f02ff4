"""Stand-alone training: files in, a model directory out.

`run_sft`, `run_preference`, `run_reward_model` and `run_pairwise_model` each take one configuration
and write one folder: `model/`, `metrics.jsonl`, `data.json` (what became of every row), `run.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from rlhf_fast.data import (
    load_conversations,
    load_preference_pairs,
    load_scored_texts,
)
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.models.pairwise import Comparison, PairwiseFormat
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.plugins import resolve_model
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.lengths import LengthConfig, limit_length
from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_preference
from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
from rlhf_fast.training.reward_regression import (
    RegressionConfig,
    ScoredResponses,
    train_reward_regression,
)
from rlhf_fast.training.session import ComputeConfig, OutputConfig, Session, weight_dtype
from rlhf_fast.training.sft import train_sft

Record = TypeVar("Record")


@dataclass(frozen=True)
class RunConfig:
    """What every stand-alone training needs."""

    model: str = ""
    """Model to start from: a directory or a hub name, with a chat template."""
    data: str = ""
    """A .jsonl, .json, .csv or .parquet file, a saved or a hub dataset, or module:function."""
    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    bad_rows: Literal["stop", "count"] = "stop"
    """A row that cannot be read stops the run, or is left out and counted in `data.json`."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """What happens to rows that are too long."""
    lora: LoraConfig | None = None
    """Trains adapters and leaves the model's own weights as they are."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How the model is computed."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Where the results go."""
    seed: int = 0
    """Seed of everything random."""

    def check_complete(self) -> None:
        """Raises if a value without a default is missing."""
        for name in ("model", "data"):
            if not getattr(self, name):
                raise UserError(f"{name} is missing")


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
class RewardRun(RunConfig):
    """A reward model from pairs, or from scores."""

    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    """Objective and optimiser."""

    def __post_init__(self) -> None:
        if self.training.objective == "pairwise":
            raise UserError("objective pairwise is trained by run_pairwise_model")


@dataclass(frozen=True)
class PairwiseRun(SFTRun):
    """A model that says which of two responses is better, by the token `A` or `B`."""


def run_sft(run: SFTRun) -> Path:
    """Fine-tunes a language model; returns the model's directory."""
    run.check_complete()
    session = Session("sft", run)
    tokenizer = load_tokenizer(resolve_model(run.model))
    chat = ChatFormat(tokenizer)
    report = session.report if run.bad_rows == "count" else None
    rows = load_conversations(run.data, system_prompt=run.system_prompt, report=report)
    groups = []
    for row in rows:
        try:
            if row.text is None:
                group = chat.conversation(row.messages, every_turn=run.turns == "all")
            else:
                group = chat.plain_text(row.text)
        except UserError as error:
            raise UserError(f"{run.data}, id {row.id}: {error}") from error
        groups.append(limit_length(group, run.lengths, f"{run.data}, id {row.id}", session.report))
    return _train_language_model(session, chat, [group for group in groups if group])


def run_pairwise_model(run: PairwiseRun) -> Path:
    """Trains a pairwise preference model, every pair in both orders; returns its directory."""
    run.check_complete()
    session = Session("pairwise", run)
    chat = ChatFormat(load_tokenizer(resolve_model(run.model)))
    form = PairwiseFormat(chat)
    report = session.report if run.bad_rows == "count" else None
    groups = []
    for pair in load_preference_pairs(run.data, system_prompt=run.system_prompt, report=report):
        where = f"{run.data}, id {pair.prompt.id}"
        comparison = Comparison(pair.prompt.messages, pair.chosen, pair.rejected)
        both = form.training_groups(comparison)
        groups += [limit_length(group, run.lengths, where, session.report) for group in both]
    return _train_language_model(session, chat, [group for group in groups if group])


def run_preference(run: PreferenceRun) -> Path:
    """Trains a policy on preference pairs; returns the model's directory."""
    run.check_complete()
    session = Session("preference", run)
    chat = ChatFormat(load_tokenizer(resolve_model(run.model)))
    pairs, _ = _pairs(session, chat, run)
    session.announce_data()
    model = _language_model(session, chat, resolve_model(run.model), run.lora)
    reference = None
    if run.reference and run.dpo.needs_reference:
        reference = _language_model(session, chat, resolve_model(run.reference), None)
    rows = train_preference(
        model,
        pairs,
        reference=reference,
        reference_cache=_beside(run.data, session.directory),
        config=run.dpo,
        seed=derive_seed(run.seed, session.name),
        on_step=session.on_step,
        options=session.options,
    )
    return session.finish(model.model, chat.tokenizer, rows)


def run_reward_model(run: RewardRun) -> Path:
    """Trains a reward model; returns the model's directory."""
    run.check_complete()
    session = Session("reward model", run)
    path = resolve_model(run.model)
    chat = ChatFormat(load_tokenizer(path))
    train = _reward_from_pairs if run.training.objective == "pairs" else _reward_from_scores
    num_outputs, fit = train(session, chat, run)
    session.announce_data()
    model = fresh_reward_model(path, num_outputs=num_outputs, dtype=weight_dtype(run))
    if run.lora:
        add_lora(model, run.lora, trained_modules=("score",))
    reward_model = RewardModel(
        model.to(session.device), chat.tokenizer, **run.compute.backbone_options()
    )
    rows = fit(reward_model)
    _mark_padding(reward_model)
    return session.finish(model, chat.tokenizer, rows)


FitReward = Callable[[RewardModel], list[dict[str, float]]]


def _reward_from_pairs(session: Session, chat: ChatFormat, run: RewardRun) -> tuple[int, FitReward]:
    pairs, margins = _pairs(session, chat, run)

    def fit(model: RewardModel) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []

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

    return run.training.num_outputs, fit


def _reward_from_scores(
    session: Session, chat: ChatFormat, run: RewardRun
) -> tuple[int, FitReward]:
    report = session.report if run.bad_rows == "count" else None
    rows = load_scored_texts(run.data, system_prompt=run.system_prompt, report=report)
    names = sorted({name for row in rows for scores in row.scores for name in scores})
    objective = run.training.objective
    if objective != "attributes" and len(names) != 1:
        raise UserError(f"{run.data}: {objective} are of one score, got {names}")
    examples = []
    for row in rows:
        prompt_ids = chat.prompt_ids(row.prompt.messages)
        group = TokenGroup(prompt_ids, [chat.response_ids(text) for text in row.responses])
        where = f"{run.data}, id {row.prompt.id}"
        values = [[scores.get(name, float("nan")) for name in names] for scores in row.scores]
        parts = [(group, values)]
        if objective != "rankings":
            parts = [(single, [scores]) for single, scores in zip(group.split(), values)]
        for part, scores in parts:
            limited = limit_length(part, run.lengths, where, session.report)
            if limited:
                examples.append(ScoredResponses(limited, scores))
    config = RegressionConfig(objective, run.training.optimizer)

    def fit(model: RewardModel) -> list[dict[str, float]]:
        model.model.config.reward_outputs = names
        return train_reward_regression(
            model,
            examples,
            config=config,
            seed=derive_seed(run.seed, session.name),
            on_step=session.on_step,
            options=session.options,
        )

    return run.training.num_outputs if objective == "quantiles" else len(names), fit


def _pairs(
    session: Session, chat: ChatFormat, run: PreferenceRun | RewardRun
) -> tuple[list[TokenGroup], list[float]]:
    """(chosen, rejected) as tokens, and the margins."""
    report = session.report if run.bad_rows == "count" else None
    groups, margins = [], []
    for pair in load_preference_pairs(run.data, system_prompt=run.system_prompt, report=report):
        responses = [chat.response_ids(text) for text in (pair.chosen, pair.rejected)]
        group = limit_length(
            TokenGroup(chat.prompt_ids(pair.prompt.messages), responses),
            run.lengths,
            f"{run.data}, id {pair.prompt.id}",
            session.report,
        )
        if group:
            groups.append(group)
            margins.append(pair.margin)
    return groups, margins


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


def _language_model(
    session: Session, chat: ChatFormat, path: str, lora: LoraConfig | None
) -> LanguageModel:
    model = load_causal_lm(path, dtype=weight_dtype(session.run)).to(session.device)
    if lora:
        add_lora(model, lora)
    options = session.run.compute.backbone_options()
    return LanguageModel(model, pad_token_id=chat.end_token_id, **options)


def _mark_padding(model: RewardModel) -> None:
    """Other tools find the response's end by the pad token, so it must not be the end token."""
    tokenizer, end = model.tokenizer, model.chat.end_token_id
    others: Iterable[int] = (tokenizer.pad_token_id, *tokenizer.all_special_ids)
    model.model.config.pad_token_id = next(
        (i for i in others if i is not None and i != end), tokenizer.pad_token_id
    )


def _beside(data: str, directory: Path) -> Path:
    """Where reference log-probabilities are kept: beside a file of data, else in the run."""
    path = Path(data)
    if path.exists():
        return path.with_name(f"{path.name}.reference")
    return directory / f"reference-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
