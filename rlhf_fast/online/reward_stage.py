"""Where the run's rewards come from: ready scorers, or reward models trained in this run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rlhf_fast.data import load_preference_pairs
from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import load_tokenizer
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.online.config import OnlineConfig, RewardConfig
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.protocols import Generator
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import SelectionConfig, select
from rlhf_fast.plugins import load_function
from rlhf_fast.rewards import (
    ComposedScorer,
    Compute,
    EnsembleScorer,
    FunctionScorer,
    HeadsScorer,
    Part,
    RewardModelScorer,
    Scorer,
    ShapedScorer,
    ShapingConfig,
    make_source,
)
from rlhf_fast.rewards.shaping import mean_baseline
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
from rlhf_fast.types import (
    PreferencePair,
    Prompt,
    ScoredGroup,
    preference_pair_from_json,
    scored_group_from_json,
)


class RewardStage:
    """Builds the scorer that the configuration names, training what has to be trained first."""

    def __init__(
        self,
        run: RunFolder,
        config: OnlineConfig,
        sft_path: Path | str,
        *,
        prompts: Sequence[Prompt],
        evaluation_prompts: Sequence[Prompt],
        generator: Generator,
        compute: Compute,
        progress: Progress,
    ) -> None:
        self.run = run
        self.config = config
        self.sft_path = sft_path
        self.prompts = prompts
        self.evaluation_prompts = evaluation_prompts
        self.generator = generator
        self.compute = compute
        self.progress = progress

    def scorer(self) -> Scorer:
        """Must be called while the generator has the weights of the SFT model."""
        shaping = self.config.reward.shaping
        scorer = self._raw_scorer()
        if shaping == ShapingConfig():
            return scorer
        return ShapedScorer(scorer, shaping, self._baseline(scorer))

    def _raw_scorer(self) -> Scorer:
        reward = self.config.reward
        if not (reward.pairs or reward.labeller):
            return ready_scorer(reward, self.compute, seed=self.config.seed)
        count = reward.ensemble.members
        names = ["model"] if count == 1 else [f"model_{k}" for k in range(1, count + 1)]
        members = {
            name: self.run.directory(
                f"reward_model/{name}",
                lambda path, k=k: self._train(path, k if count > 1 else None),
                lambda path: RewardModelScorer(self.compute.reward_model(str(path))),
            )
            for k, name in enumerate(names, 1)
        }
        return members["model"] if count == 1 else _ensemble(members, reward)

    def _baseline(self, scorer: Scorer) -> dict[str, float]:
        count = self.config.reward.shaping.baseline_samples
        if not count:
            return {}

        def score() -> list[ScoredGroup]:
            seed = derive_seed(self.config.seed, "baseline")
            prompts = {p.id: p for p in (*self.prompts, *self.evaluation_prompts)}
            return scorer.score(
                self.generator.generate(list(prompts.values()), num_generations=count, seed=seed)
            )

        return mean_baseline(self.run.records("reward_baseline", scored_group_from_json, score))

    def _train(self, path: Path, member: int | None) -> None:
        metrics = train_reward_checkpoint(
            path,
            self.sft_path,
            self.config.reward.training,
            self._token_pairs,
            compute=self.compute,
            seed=self.config.seed,
            member=member,
            on_step=self.progress.step,
        )
        self.progress.reward_model(metrics)

    def _token_pairs(self, model: RewardModel) -> list[TokenGroup]:
        reward = self.config.reward
        if reward.pairs:
            return text_pairs(model, reward.pairs, self.config.data.system_prompt)
        pairs = self.run.records("reward_model/pairs", preference_pair_from_json, self._label)
        if not pairs:
            raise UserError(
                f"the labeller {reward.labeller} gave no two responses to a prompt labels at least "
                f"{reward.labelled_min_gap} apart: lower reward.labelled_min_gap or sample more"
            )
        return [
            model.token_group(
                p.chosen.prompt.messages,
                [p.chosen.text, p.rejected.text],
                [p.chosen.finished, p.rejected.finished],
            )
            for p in pairs
        ]

    def _label(self) -> list[PreferencePair]:
        reward = self.config.reward
        samples = self.generator.generate(
            self.prompts,
            num_generations=reward.labelled_samples_per_prompt,
            seed=derive_seed(self.config.seed, "labelled_samples"),
        )
        labelled = FunctionScorer(reward.labeller).score(samples)
        return [pair for group in labelled for pair in pairs_by_gap(group, reward)]


def ready_scorer(reward: RewardConfig, compute: Compute, *, seed: int) -> Scorer:
    """The scorer of a configuration that needs no training, before shaping."""
    if reward.models:
        members = {path: RewardModelScorer(compute.reward_model(path)) for path in reward.models}
        return _ensemble(members, reward)
    if reward.model and reward.ensemble.reduction != "mean":
        ensemble = reward.ensemble
        model = compute.reward_model(reward.model)
        return HeadsScorer(model, ensemble.reduction, coefficient=ensemble.coefficient)
    if not reward.parts:
        return make_source(reward, compute, seed=derive_seed(seed, "judge"))
    parts = {
        part.name: Part(
            make_source(part, compute, seed=derive_seed(seed, "judge", part.name)),
            part.weight,
            part.is_constraint,
            part.threshold,
        )
        for part in reward.parts
    }
    composition = reward.composition
    return ComposedScorer(
        parts,
        composition.combination,
        gate=load_function(composition.gate) if composition.gate else None,
        threshold=composition.threshold,
        violation=composition.violation_reward,
    )


def _ensemble(members: dict[str, Scorer], reward: RewardConfig) -> Scorer:
    ensemble = reward.ensemble
    return EnsembleScorer(members, ensemble.reduction, coefficient=ensemble.coefficient)


def train_reward_checkpoint(
    path: Path,
    base: Path | str,
    training: RewardTrainingConfig,
    token_pairs: Callable[[RewardModel], list[TokenGroup]],
    *,
    compute: Compute,
    seed: int,
    member: int | None = None,
    on_step: Callable[[dict[str, float], int], None],
) -> dict[str, float]:
    """Trains a reward model that starts from `base`; writes it to `path`, its accuracy beside it.

    Members of an ensemble differ by their bootstrap samples.
    """
    seed = derive_seed(seed, "reward_model", *([member] if member else []))
    model = untrained_reward_model(base, training, compute)
    pairs = token_pairs(model)
    metrics = train_reward_model(
        model,
        pairs if member is None else bootstrap(pairs, seed),
        config=training,
        seed=seed,
        on_step=on_step,
    )
    suffix = "" if member is None else f"_{member}"
    write_jsonl(path.parent / f"metrics{suffix}.jsonl", [metrics])
    save_model(path, model.model, model.tokenizer)
    return metrics


def text_pairs(model: RewardModel, source: str, system_prompt: str | None) -> list[TokenGroup]:
    """The user's preference pairs in the reward model's own tokens."""
    return [
        model.token_group(p.prompt.messages, [p.chosen, p.rejected], [True, True])
        for p in load_preference_pairs(source, system_prompt=system_prompt)
    ]


def untrained_reward_model(
    base: Path | str, training: RewardTrainingConfig, compute: Compute
) -> RewardModel:
    """The language model with a zero head; float32 where the whole model is trained."""
    tokenizer = load_tokenizer(str(base))
    dtype = torch.float32 if training.parameters == "all" else torch.bfloat16
    model = fresh_reward_model(str(base), dtype=dtype)
    result = RewardModel(
        model.to(compute.device),
        tokenizer,
        precision=compute.precision,
        micro_batch_tokens=compute.micro_batch_tokens,
    )
    # Other tools find the response's end by the pad token, so it must differ from the end token.
    others = [i for i in tokenizer.all_special_ids if i != result.chat.end_token_id]
    if tokenizer.pad_token_id != result.chat.end_token_id:
        model.config.pad_token_id = tokenizer.pad_token_id
    elif others:
        model.config.pad_token_id = others[0]
    return result


def bootstrap(pairs: Sequence[TokenGroup], seed: int) -> list[TokenGroup]:
    """As many prompts as there are, drawn with replacement; a prompt brings all its pairs."""
    by_prompt: dict[tuple[int, ...], list[TokenGroup]] = {}
    for pair in pairs:
        by_prompt.setdefault(tuple(pair.prompt_ids), []).append(pair)
    prompts = list(by_prompt)
    drawn = random.Random(seed).choices(prompts, k=len(prompts))
    return [pair for prompt in drawn for pair in by_prompt[prompt]]


def pairs_by_gap(group: ScoredGroup, reward: RewardConfig) -> list[PreferencePair]:
    """The pairs of one prompt whose labels differ enough, widest gaps first."""
    config = SelectionConfig(
        "widest_gaps",
        pairs_per_prompt=reward.labelled_max_pairs_per_prompt,
        min_gap=reward.labelled_min_gap,
    )
    return select([group], config, seed=0)
