"""The loop of online iterative RLHF (arXiv 2405.07863, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.online.cards import write_cards
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.evaluate import Evaluator
from rlhf_fast.online.metrics import training_metrics
from rlhf_fast.online.overlap import Ahead
from rlhf_fast.online.protocols import Generator, Policy
from rlhf_fast.online.reference import advance_reference, extrapolated
from rlhf_fast.online.rounds import prompts_of_iteration, prompts_of_round, round_name
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import select
from rlhf_fast.rewards import Scorer, score_together
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import (
    Group,
    PreferencePair,
    Prompt,
    ScoredGroup,
    group_from_json,
    preference_pair_from_json,
    scored_group_from_json,
)

Selected = list[PreferencePair] | list[ScoredGroup]


class OnlineLoop:
    """Generate, score, select, update, evaluate; each step is a stage of the run folder."""

    def __init__(
        self,
        run: RunFolder,
        config: OnlineConfig,
        prompts: Sequence[Prompt],
        *,
        generator: Generator,
        scorer: Scorer,
        policy: Policy,
        evaluator: Evaluator,
        sft_path: Path | str,
        refreshed: Callable[[int, list[Group]], Scorer] | None = None,
    ) -> None:
        self.run = run
        self.config = config
        self.prompts = prompts
        self.generator = generator
        self.scorer = scorer
        self.policy = policy
        self.evaluator = evaluator
        self.sft_path = sft_path
        self.refreshed = refreshed

    def run_iterations(self) -> None:
        """Runs what is not finished; `policy` must be the one of the last finished iteration."""
        for iteration in range(len(self.run.metrics()), self.config.num_iterations + 1):
            training = self._iterate(iteration) if iteration else {}
            row = self.evaluator.evaluate(iteration, self.policy) | training
            # Before the metrics, with which the iteration is complete.
            rows = [*self.run.metrics(), row]
            self.run.launch.on_main(partial(write_cards, self.run.path, self.config, rows))
            self.run.add_metrics(row)
            self.run.prune_policies(iteration, self.config.keep_checkpoints)

    def _iterate(self, iteration: int) -> dict[str, float | None]:
        run, name = self.run, f"iteration_{iteration}"
        seed = partial(derive_seed, self.config.seed, name)
        scored = self._sampled(iteration, seed("select"))
        selected = self._selected(name, lambda: self._select(scored, seed("select")))
        if self.config.data.accumulate:
            for earlier in range(1, iteration):
                selected = self._selected(f"iteration_{earlier}") + selected
        advance_reference(run, self.config.reference, self.policy, iteration)
        with self._generated_ahead(iteration + 1):
            self._update(iteration, selected, seed("update"))
        self.generator.load_weights(self.policy)
        staleness = int(self.config.overlap and iteration > 1)
        return training_metrics(run, name, scored, selected) | {"staleness": staleness}

    def _sampled(self, iteration: int, seed: int) -> list[ScoredGroup]:
        """Responses with rewards, a round after the other until enough prompts teach something."""
        run, name, scored = self.run, f"iteration_{iteration}", []
        for number in range(1, self.config.data.max_rounds + 1):
            prompts = prompts_of_round(self.prompts, iteration, scored, self.config, seed=seed)
            if not prompts:
                break
            completions = run.records(
                f"{name}/{round_name('completions', number)}",
                group_from_json,
                partial(self._generate, iteration, prompts, number),
            )
            scored += run.records(
                f"{name}/{round_name('scored', number)}",
                scored_group_from_json,
                partial(self._score, iteration, completions),
            )
        return scored

    def _generate(self, iteration: int, prompts: Sequence[Prompt], number: int = 1) -> list[Group]:
        names = f"iteration_{iteration}", round_name("generate", number)
        return self.generator.generate(
            prompts,
            num_generations=self.config.generation.num_generations,
            seed=derive_seed(self.config.seed, *names),
        )

    def _score(self, iteration: int, completions: list[Group]) -> list[ScoredGroup]:
        scorer = self.refreshed(iteration, completions) if self.refreshed else self.scorer
        return score_together(scorer, completions, self.run.launch)

    def _generated_ahead(self, iteration: int) -> Ahead:
        """With `overlap`, samples the next iteration from the present weights meanwhile."""
        compute = None
        if self.config.overlap and iteration <= self.config.num_iterations:
            prompts = prompts_of_iteration(self.prompts, iteration, self.config)
            compute = partial(self._generate, iteration, prompts)
        return Ahead(self.run, iteration, compute)

    def _selected(self, name: str, compute=None) -> Selected:
        if self.config.selection.makes_pairs:
            return self.run.records(f"{name}/pairs", preference_pair_from_json, compute)
        return self.run.records(f"{name}/selected", scored_group_from_json, compute)

    def _select(self, scored: Sequence[ScoredGroup], seed: int) -> Selected:
        selected = select(scored, self.config.selection, seed=seed)
        if not selected:
            what = "no preference pair" if self.config.selection.makes_pairs else "no response"
            raise UserError(
                f"{what} in {len(scored)} prompts: by rule {self.config.selection.rule} nothing "
                f"is selected, as when all responses to each prompt have equal rewards; check the "
                f"reward, or sample more responses or at a higher temperature"
            )
        return selected

    def _update(self, iteration: int, selected: Selected, seed: int) -> None:
        name, scale = f"iteration_{iteration}", self.config.reference.extrapolation
        trained = "trained" if scale else "policy"
        self.run.directory(
            f"{name}/{trained}", lambda path: self._train(selected, seed, path), self.policy.load
        )
        if scale:
            before = self.run.path / f"iteration_{iteration - 1}" / "trained"
            base = before if iteration > 1 else self.sft_path
            after = self.run.path / name / "trained"
            self.run.directory(
                f"{name}/policy",
                lambda path: self.run.launch.on_main(
                    lambda: extrapolated(path, base, after, scale)
                ),
                self.policy.load,
            )

    def _train(self, selected: Selected, seed: int, path: Path) -> None:
        rows = self.policy.update(selected, seed=seed)
        self.run.launch.on_main(lambda: self._save(path, rows))

    def _save(self, path: Path, rows: list[dict[str, float]]) -> None:
        write_jsonl(path.parent / "training.jsonl", rows)
        self.policy.save(path)
