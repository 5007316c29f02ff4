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
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import select
from rlhf_fast.rewards import Scorer
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
            write_cards(self.run.path, self.config, [*self.run.metrics(), row])
            self.run.add_metrics(row)
            self.run.prune_policies(iteration, self.config.keep_checkpoints)

    def _iterate(self, iteration: int) -> dict[str, float | None]:
        run, name = self.run, f"iteration_{iteration}"
        seed = partial(derive_seed, self.config.seed, name)
        completions = run.records(
            f"{name}/completions", group_from_json, partial(self._generate, iteration)
        )
        scored = run.records(
            f"{name}/scored", scored_group_from_json, partial(self._score, iteration, completions)
        )
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

    def _generate(self, iteration: int) -> list[Group]:
        return self.generator.generate(
            prompts_of_iteration(self.prompts, iteration, self.config),
            num_generations=self.config.generation.num_generations,
            seed=derive_seed(self.config.seed, f"iteration_{iteration}", "generate"),
        )

    def _score(self, iteration: int, completions: list[Group]) -> list[ScoredGroup]:
        scorer = self.refreshed(iteration, completions) if self.refreshed else self.scorer
        return scorer.score(completions)

    def _generated_ahead(self, iteration: int) -> Ahead:
        """With `overlap`, samples the next iteration from the present weights meanwhile."""
        wanted = self.config.overlap and iteration <= self.config.num_iterations
        return Ahead(self.run, iteration, partial(self._generate, iteration) if wanted else None)

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
            self.run.directory(
                f"{name}/policy",
                lambda path: extrapolated(
                    path,
                    before if iteration > 1 else self.sft_path,
                    self.run.path / name / "trained",
                    scale,
                ),
                self.policy.load,
            )

    def _train(self, selected: Selected, seed: int, path: Path) -> None:
        rows = self.policy.update(selected, seed=seed)
        write_jsonl(path.parent / "training.jsonl", rows)
        self.policy.save(path)


def prompts_of_iteration(
    prompts: Sequence[Prompt], iteration: int, config: OnlineConfig
) -> list[Prompt]:
    """This iteration's share of the prompts; the next iteration goes on where this one ends."""
    count = config.data.prompts_per_iteration or len(prompts)
    start = (iteration - 1) * count
    return [prompts[(start + i) % len(prompts)] for i in range(min(count, len(prompts)))]
