"""The loop of online iterative RLHF (arXiv 2405.07863, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.evaluate import Evaluator
from rlhf_fast.online.metrics import reward_metrics
from rlhf_fast.online.protocols import Generator, Policy
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import select
from rlhf_fast.rewards import Scorer
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import (
    PreferencePair,
    Prompt,
    ScoredGroup,
    group_from_json,
    preference_pair_from_json,
    scored_group_from_json,
)


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
    ) -> None:
        self.run = run
        self.config = config
        self.prompts = prompts
        self.generator = generator
        self.scorer = scorer
        self.policy = policy
        self.evaluator = evaluator

    def run_iterations(self) -> None:
        """Runs what is not finished; `policy` must be the one of the last finished iteration."""
        for iteration in range(len(self.run.metrics()), self.config.num_iterations + 1):
            training = self._iterate(iteration) if iteration else {}
            self.run.add_metrics(self.evaluator.evaluate(iteration, self.policy) | training)
            self.run.prune_policies(iteration, self.config.keep_checkpoints)

    def _iterate(self, iteration: int) -> dict[str, float | None]:
        run, config, name = self.run, self.config, f"iteration_{iteration}"
        seed = partial(derive_seed, config.seed, name)
        prompts = prompts_of_iteration(self.prompts, iteration, config)
        completions = run.records(
            f"{name}/completions",
            group_from_json,
            lambda: self.generator.generate(
                prompts, num_generations=config.generation.num_generations, seed=seed("generate")
            ),
        )
        scored = run.records(
            f"{name}/scored", scored_group_from_json, lambda: self.scorer.score(completions)
        )
        pairs = run.records(
            f"{name}/pairs", preference_pair_from_json, lambda: self._select(scored, seed("select"))
        )
        if config.reference == "previous":
            self.policy.move_reference()
        run.directory(
            f"{name}/policy",
            lambda path: self._update(pairs, seed("update"), path),
            self.policy.load,
        )
        self.generator.load_weights(self.policy)
        return training_metrics(run, name, scored, pairs)

    def _select(self, scored: Sequence[ScoredGroup], seed: int) -> list[PreferencePair]:
        pairs = select(scored, self.config.selection, seed=seed)
        if not pairs:
            raise UserError(
                f"no preference pair in {len(scored)} prompts: all responses to each prompt have "
                f"equal rewards; check the reward, or sample more responses or at a higher "
                f"temperature"
            )
        return pairs

    def _update(self, pairs: Sequence[PreferencePair], seed: int, path: Path) -> None:
        rows = self.policy.update(pairs, seed=seed)
        write_jsonl(path.parent / "training.jsonl", rows)
        self.policy.save(path)


def prompts_of_iteration(
    prompts: Sequence[Prompt], iteration: int, config: OnlineConfig
) -> list[Prompt]:
    """This iteration's share of the prompts; the next iteration goes on where this one ends."""
    count = config.data.prompts_per_iteration or len(prompts)
    start = (iteration - 1) * count
    return [prompts[(start + i) % len(prompts)] for i in range(min(count, len(prompts)))]


def training_metrics(
    run: RunFolder, name: str, scored: Sequence[ScoredGroup], pairs: Sequence[PreferencePair]
) -> dict[str, float | None]:
    """Rewards of the iteration's samples, means over its optimiser steps, seconds per stage."""
    steps = run.training_rows(name)
    keys = ("loss", "reward_accuracy", "reward_margin", "chosen_logps", "rejected_logps")
    means = {key: sum(step[key] for step in steps) / len(steps) for key in keys}
    seconds = {
        "seconds_generate": run.seconds(f"{name}/completions"),
        "seconds_score": run.seconds(f"{name}/scored"),
        "seconds_update": run.seconds(f"{name}/policy"),
    }
    paired = {pair.chosen.prompt.id for pair in pairs}
    counts = {"num_pairs": len(pairs), "num_ties": len(scored) - len(paired)}
    return {**reward_metrics(scored), **counts, **means, **seconds}
