"""Where the run's rewards come from: ready scorers, or reward models trained in this run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from rlhf_fast.data import ScoredTexts, TextPair
from rlhf_fast.errors import UserError
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.protocols import Generator
from rlhf_fast.online.reward_config import RewardConfig
from rlhf_fast.online.reward_training import FROM_PAIRS, RewardData, train_reward_checkpoint
from rlhf_fast.online.reward_voting import all_corrected, differences
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import SelectionConfig, select
from rlhf_fast.online.self_judge import answers_of
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
    score_together,
)
from rlhf_fast.rewards.config import EnsembleConfig, SourceConfig
from rlhf_fast.rewards.policy_judge import AnswersOfPolicy
from rlhf_fast.rewards.shaping import mean_baseline
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import (
    Group,
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

    def refreshed(self, iteration: int, completions: Sequence[Group]) -> Scorer:
        """The scorer whose reward model has learned from pairs of this iteration's responses too.

        Those of earlier iterations must be there.
        """
        reward, pairs = self.config.reward, []
        for k in range(1, iteration + 1):
            name = f"iteration_{k}/reward_pairs"
            compute = partial(self._labelled_pairs, iteration, completions)
            pairs += self.run.records(
                name, preference_pair_from_json, compute if k == iteration else None
            )
        new = [_text_pair(pair) for pair in pairs]
        scorer = self.run.directory(
            f"iteration_{iteration}/reward_model",
            lambda path: self._train(  # first, as the last pairs are held out
                path, replace(self._data, pairs=[*new, *self._data.pairs]), None
            ),
            lambda path: self._trained(path, is_member=False),
        )
        shaped = reward.shaping != ShapingConfig()
        return ShapedScorer(scorer, reward.shaping) if shaped else scorer

    def _labelled_pairs(self, iteration: int, completions: Sequence[Group]) -> list[PreferencePair]:
        """Pairs that the labeller, or the last reward model where it is sure, can tell apart."""
        reward = self.config.reward
        if reward.refresh.labels == "labeller":
            labeller, min_gap = FunctionScorer(reward.labeller), reward.labelled_min_gap
        else:
            last = f"iteration_{iteration - 1}/reward_model"
            path = self.run.path / (last if iteration > 1 else "reward_model/model")
            labeller, min_gap = self._trained(path, is_member=False), reward.refresh.min_gap
        groups = score_together(labeller, completions, self.run.launch)
        return [pair for group in groups for pair in pairs_by_gap(group, reward, min_gap)]

    def _raw_scorer(self) -> Scorer:
        reward = self.config.reward
        if not reward.trains:
            answers = self.run.path / "judge_answers.jsonl"
            return ready_scorer(
                reward,
                self.compute,
                seed=self.config.seed,
                answers=answers,
                ask_policy=partial(answers_of, self.generator),
            )
        count = reward.ensemble.members
        names = ["model"] if count == 1 else [f"model_{k}" for k in range(1, count + 1)]
        members = {
            name: self.run.directory(
                f"reward_model/{name}",
                lambda path, k=k: self._train(path, self._data, k if count > 1 else None),
                lambda path: self._trained(path, is_member=count > 1),
            )
            for k, name in enumerate(names, 1)
        }
        return members["model"] if count == 1 else _ensemble(members, reward)

    @cached_property
    def _data(self) -> RewardData:
        """What the reward model learns from, once others have voted on it."""
        data, vote = self._uncorrected, self.config.reward.vote
        if not vote.corrections:
            return data
        pairs = all_corrected(data.pairs, differences(self._voters(), data.pairs), vote)
        turned = sum(new.chosen != old.chosen for new, old in zip(pairs, data.pairs))
        self.progress.note(
            f"the vote of {vote.members or len(vote.models)} reward models turns {turned} of "
            f"{len(pairs)} pairs"
        )
        return replace(data, pairs=pairs)

    def _voters(self) -> Iterator[Scorer]:
        """One after the other, so that one at a time is in memory."""
        vote = self.config.reward.vote
        for path in vote.models:
            yield RewardModelScorer(self.compute.reward_model(path))
        for k in range(1, vote.members + 1):
            yield self.run.directory(
                f"reward_model/voter_{k}",
                lambda path, k=k: self._train(path, self._uncorrected, k),
                lambda path: self._trained(path, is_member=True),
            )

    def _trained(self, path: Path, *, is_member: bool) -> Scorer:
        reward = self.config.reward
        if reward.training.objective == "pairwise":
            source = SourceConfig(pairwise_model=str(path), ranking=reward.ranking)
            return make_source(source, self.compute, seed=0)
        if reward.training.objective == "segments":
            source = SourceConfig(model=str(path), segment_model=str(self.sft_path))
            return make_source(source, self.compute, seed=0)
        ensemble = EnsembleConfig() if is_member else reward.ensemble
        return ready_scorer(RewardConfig(model=str(path), ensemble=ensemble), self.compute, seed=0)

    def _baseline(self, scorer: Scorer) -> dict[str, float]:
        count = self.config.reward.shaping.baseline_samples
        if not count:
            return {}

        def score() -> list[ScoredGroup]:
            seed = derive_seed(self.config.seed, "baseline")
            prompts = {p.id: p for p in (*self.prompts, *self.evaluation_prompts)}
            groups = self.generator.generate(
                list(prompts.values()), num_generations=count, seed=seed
            )
            return score_together(scorer, groups, self.run.launch)

        return mean_baseline(self.run.records("reward_baseline", scored_group_from_json, score))

    def _train(self, path: Path, data: RewardData, member: int | None) -> None:
        """By one process: a large reward model is trained before, and given as `reward.model`."""
        suffix = "" if path.name == "model" else f"_{path.name.removeprefix('model_')}"
        metrics = self.run.launch.on_main(
            lambda: train_reward_checkpoint(
                path,
                self.sft_path,
                self.config.reward.training,
                data,
                compute=self.compute,
                seed=self.config.seed,
                member=member,
                on_step=self.progress.step,
                log=path.parent / f"metrics{suffix}.jsonl",
            )
        )
        self.progress.reward_model(metrics)

    @cached_property
    def _uncorrected(self) -> RewardData:
        reward = self.config.reward
        if not reward.labeller:
            return RewardData.load(reward.pairs, reward.scores, **self.config.data.reading())
        if reward.training.objective not in FROM_PAIRS:
            groups = self.run.records(
                "reward_model/labelled", scored_group_from_json, self._labelled
            )
            return RewardData(scored=[_scored_texts(group) for group in groups])
        pairs = self.run.records("reward_model/pairs", preference_pair_from_json, self._pairs)
        if not pairs:
            raise UserError(
                f"the labeller {reward.labeller} gave no two responses to a prompt labels at least "
                f"{reward.labelled_min_gap} apart: lower reward.labelled_min_gap or sample more"
            )
        return RewardData([_text_pair(pair) for pair in pairs])

    def _labelled(self) -> list[ScoredGroup]:
        reward = self.config.reward
        samples = self.generator.generate(
            self.prompts,
            num_generations=reward.labelled_samples_per_prompt,
            seed=derive_seed(self.config.seed, "labelled_samples"),
        )
        return score_together(FunctionScorer(reward.labeller), samples, self.run.launch)

    def _pairs(self) -> list[PreferencePair]:
        reward = self.config.reward
        groups = self._labelled()
        return [p for group in groups for p in pairs_by_gap(group, reward, reward.labelled_min_gap)]


def _text_pair(pair: PreferencePair) -> TextPair:
    chosen, rejected = pair.chosen, pair.rejected
    finished = chosen.finished, rejected.finished
    return TextPair(chosen.prompt, chosen.text, rejected.text, finished=finished)


def _scored_texts(group: ScoredGroup) -> ScoredTexts:
    return ScoredTexts(
        group.prompt,
        [c.text for c in group.completions],
        [{"score": reward} for reward in group.rewards],
        [c.finished for c in group.completions],
    )


def ready_scorer(
    reward: RewardConfig,
    compute: Compute,
    *,
    seed: int,
    answers: Path | None = None,
    ask_policy: AnswersOfPolicy | None = None,
) -> Scorer:
    """The scorer of a configuration that needs no training, before shaping.

    `answers` and `ask_policy`: as for `make_source`.
    """
    if reward.models:
        members = {path: RewardModelScorer(compute.reward_model(path)) for path in reward.models}
        return _ensemble(members, reward)
    if reward.model and reward.ensemble.reduction != "mean":
        ensemble = reward.ensemble
        model = compute.reward_model(reward.model)
        return HeadsScorer(model, ensemble.reduction, coefficient=ensemble.coefficient)
    judges = {"answers": answers, "ask_policy": ask_policy}
    if not reward.parts:
        return make_source(reward, compute, seed=derive_seed(seed, "judge"), **judges)
    parts = {
        part.name: Part(
            make_source(part, compute, seed=derive_seed(seed, "judge", part.name), **judges),
            part.weight,
            part.is_constraint,
            part.threshold,
            part.margin,
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


def pairs_by_gap(group: ScoredGroup, reward: RewardConfig, min_gap: float) -> list[PreferencePair]:
    """The pairs of one prompt whose labels differ enough, widest gaps first."""
    config = SelectionConfig(
        "widest_gaps",
        pairs_per_prompt=reward.labelled_max_pairs_per_prompt,
        min_gap=min_gap,
    )
    return select([group], config, seed=0)
