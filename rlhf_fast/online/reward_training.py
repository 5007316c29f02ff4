"""Reward models from preference pairs or scored responses, by any objective, as checkpoints."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf_fast.data import ScoredTexts, TextPair, load_preference_pairs, load_scored_texts
from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.pairwise import Comparison, PairwiseFormat, preference_probabilities
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.rewards import Compute
from rlhf_fast.rewards.segments import Segmenter, normaliser_of
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.gating import train_gate
from rlhf_fast.training.reward import RewardTrainingConfig, hold_out, train_reward_model
from rlhf_fast.training.reward_regression import (
    RegressionConfig,
    ScoredResponses,
    accuracy,
    mean_or_nan,
    train_reward_regression,
)
from rlhf_fast.training.sft import train_sft

FROM_PAIRS = ("pairs", "segments", "pairwise")
OnStep = Callable[[dict[str, float], int], None]
Record = TypeVar("Record", TextPair, ScoredTexts)


@dataclass(frozen=True)
class RewardData:
    """What a reward model learns from: pairs of responses, scored responses, or both."""

    pairs: Sequence[TextPair] = field(default_factory=list)
    scored: Sequence[ScoredTexts] = field(default_factory=list)

    @classmethod
    def load(cls, pairs: str | None, scores: str | None, **reading: Any) -> RewardData:
        """Of two sources; `reading` as `RowOptions.reading` gives it."""
        return cls(
            load_preference_pairs(pairs, **reading) if pairs else [],
            load_scored_texts(scores, **reading) if scores else [],
        )

    def bootstrap(self, seed: int) -> RewardData:
        """As many prompts as there are, drawn with replacement; a prompt brings all its rows."""
        return RewardData(_bootstrap(self.pairs, seed), _bootstrap(self.scored, seed))

    def check(self, training: RewardTrainingConfig) -> None:
        """Raises unless it is what the objective learns from."""
        learns_from_pairs = training.objective in FROM_PAIRS
        gated = training.objective == "attributes"
        if not (self.pairs if learns_from_pairs else self.scored):
            raise UserError(
                f"reward objective {training.objective} learns from "
                f"{'preference pairs' if learns_from_pairs else 'scored responses'}, got none"
            )
        if (self.scored and learns_from_pairs) or (self.pairs and self.scored and not gated):
            raise UserError(
                f"reward objective {training.objective} has no use for both pairs and scores; "
                f"objective attributes trains its gate on the pairs"
            )
        names = self.score_names()
        if not learns_from_pairs and not gated and len(names) != 1:
            raise UserError(f"reward objective {training.objective} is of one score, got {names}")

    def score_names(self) -> list[str]:
        return sorted({name for row in self.scored for scores in row.scores for name in scores})


def train_reward_checkpoint(
    path: Path,
    base: Path | str,
    training: RewardTrainingConfig,
    data: RewardData,
    *,
    compute: Compute,
    seed: int,
    member: int | None = None,
    on_step: OnStep,
    log: Path,
) -> dict[str, float]:
    """Trains a reward model that starts from `base`; writes it to `path`, its accuracy to `log`.

    Members of an ensemble differ by their bootstrap samples.
    """
    data.check(training)
    seed = derive_seed(seed, "reward_model", *([member] if member else []))
    if member is not None:
        data = data.bootstrap(seed)
    if training.objective == "pairwise":
        metrics = _train_pairwise(path, base, training, data.pairs, compute, seed, on_step)
    elif training.objective in ("pairs", "segments"):
        metrics = _train_on_pairs(path, base, training, data.pairs, compute, seed, on_step)
    else:
        metrics = _train_on_scores(path, base, training, data, compute, seed, on_step)
    write_jsonl(log, [metrics])
    return metrics


def _train_on_pairs(path, base, training, pairs, compute, seed, on_step) -> dict[str, float]:
    model = untrained_reward_model(base, training, compute, training.head_outputs)
    groups = _token_pairs(model, pairs)
    if training.objective == "segments":
        groups = _segmenter(model, base, training, compute).mark(groups)
        model.segments = {"boundary": training.segments}
    metrics = train_reward_model(
        model,
        groups,
        margins=[pair.margin for pair in pairs],
        targets=[pair.target for pair in pairs],
        config=training,
        seed=seed,
        on_step=on_step,
    )
    if training.objective == "segments":
        model.model.config.reward_segments = {
            "boundary": training.segments,
            "entropy_threshold": training.entropy_threshold,
            "normaliser": asdict(normaliser_of(model, groups)),
        }
    model.save(path)
    return metrics


def _segmenter(model, base, training, compute) -> Segmenter:
    if training.segments == "sentences":
        return Segmenter(model.tokenizer)
    language_model = compute.language_model(str(base), model.chat)
    return Segmenter(model.tokenizer, training.entropy_threshold, language_model)


def _train_pairwise(path, base, training, pairs, compute, seed, on_step) -> dict[str, float]:
    chat = ChatFormat(load_tokenizer(str(base)))
    model, form = compute.language_model(str(base), chat), PairwiseFormat(chat)
    train, held_out = hold_out(pairs, training.holdout_share, _conversation)
    shown = [Comparison(p.prompt.messages, p.chosen, p.rejected) for p in (*train, *held_out)]
    groups = [group for c in shown[: len(train)] for group in form.training_groups(c)]
    train_sft(model, groups, config=training.optimizer, seed=seed, on_step=on_step)
    right = [float(p > 0.5) for p in preference_probabilities(model, form, shown)]
    save_model(path, model.model, chat.tokenizer)
    return {
        "num_pairs": len(train),
        "num_held_out_pairs": len(held_out),
        "accuracy": statistics.fmean(right[: len(train)]),
        "held_out_accuracy": mean_or_nan(right[len(train) :]),
    }


def _train_on_scores(path, base, training, data, compute, seed, on_step) -> dict[str, float]:
    names = data.score_names()
    counts = {"attributes": len(names), "quantiles": training.num_outputs}
    num_outputs = counts.get(training.objective, 1)
    model = untrained_reward_model(base, training, compute, num_outputs)
    model.model.config.reward_outputs = names
    train, held_out = hold_out(data.scored, training.holdout_share, _conversation)
    learned, others = ([_example(model, row, names) for row in part] for part in (train, held_out))
    config = RegressionConfig(training.objective, training.optimizer)
    rows = train_reward_regression(
        model,
        learned,
        config=config,
        seed=seed,
        on_step=on_step,
    )
    if data.pairs:
        pairs = _token_pairs(model, data.pairs)
        model.gate = train_gate(model, pairs, config=training.gate, seed=seed, on_step=on_step)
    model.save(path)
    return {
        "num_prompts": len(train),
        "num_held_out_prompts": len(held_out),
        "loss": rows[-1]["loss"],
        "accuracy": accuracy(model, learned, config),
        "held_out_accuracy": accuracy(model, others, config),
    }


def _token_pairs(model: RewardModel, pairs: Sequence[TextPair]) -> list[TokenGroup]:
    """The pairs in the reward model's own tokens."""
    return [model.token_group(p.prompt.messages, [p.chosen, p.rejected], p.finished) for p in pairs]


def _example(model: RewardModel, row: ScoredTexts, names: list[str]) -> ScoredResponses:
    finished = row.finished or [True] * len(row.responses)
    group = model.token_group(row.prompt.messages, row.responses, finished)
    scores = [[scores.get(name, float("nan")) for name in names] for scores in row.scores]
    return ScoredResponses(group, scores)


def untrained_reward_model(
    base: Path | str, training: RewardTrainingConfig, compute: Compute, num_outputs: int = 1
) -> RewardModel:
    """The language model with a fresh head; float32 where the whole model is trained."""
    tokenizer = load_tokenizer(str(base))
    dtype = torch.float32 if training.parameters == "all" else torch.bfloat16
    model = fresh_reward_model(str(base), num_outputs=num_outputs, dtype=dtype)
    result = RewardModel(
        model.to(compute.device),
        tokenizer,
        **compute.backbone_options,
    )
    result.mark_padding()
    return result


def _conversation(row: Record) -> str:
    return json.dumps(row.prompt.messages)


def _bootstrap(rows: Sequence[Record], seed: int) -> list[Record]:
    by_prompt: dict[str, list[Record]] = {}
    for row in rows:
        by_prompt.setdefault(_conversation(row), []).append(row)
    drawn = random.Random(seed).choices(list(by_prompt), k=len(by_prompt)) if by_prompt else []
    return [row for prompt in drawn for row in by_prompt[prompt]]
