"""The loop of online iterative RLHF (arXiv 2405.07863, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.evaluate import Evaluator
from rlhf_fast.online.metrics import reward_metrics
from rlhf_fast.online.protocols import Generator, Policy, Scorer, Selector
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import (
    PreferencePair,
    Prompt,
    ScoredGroup,
    group_from_json,
    group_to_json,
    preference_pair_from_json,
    scored_group_from_json,
    to_json,
)


def run_iterations(
    run: RunFolder,
    config: OnlineConfig,
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    selector: Selector,
    policy: Policy,
    evaluator: Evaluator,
) -> None:
    """Runs the iterations that are not finished; `policy` is the one of the last finished one."""
    for iteration in range(len(run.metrics()), config.num_iterations + 1):
        name = f"iteration_{iteration}"
        if iteration > 0:
            seed = partial(derive_seed, config.seed, name)
            batch = prompts_of_iteration(prompts, iteration, config)
            completions = run.records(
                f"{name}/completions",
                lambda: generator.generate(
                    batch,
                    num_generations=config.generation.num_generations,
                    seed=seed("generate"),
                ),
                group_to_json,
                group_from_json,
            )
            scored = run.records(
                f"{name}/scored", lambda: scorer.score(completions), to_json, scored_group_from_json
            )
            pairs = run.records(
                f"{name}/pairs",
                lambda: _select(selector, scored),
                to_json,
                preference_pair_from_json,
            )
            if config.reference == "previous":
                policy.move_reference()
            run.directory(
                f"{name}/policy",
                lambda path: _update(run, name, policy, pairs, seed("update"), path),
                policy.load,
            )
            generator.load_weights(policy)
        row = evaluator.evaluate(iteration, policy)
        if iteration > 0:
            row |= training_metrics(run, name, scored, pairs)
        run.add_metrics(row)
        run.prune_policies(iteration, config.keep_checkpoints)


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
    counts = {"num_pairs": len(pairs), "num_ties": len(scored) - len(pairs)}
    return {**reward_metrics(scored), **counts, **means, **seconds}


def _select(selector: Selector, scored: Sequence[ScoredGroup]) -> list[PreferencePair]:
    pairs = selector.select(scored)
    if not pairs:
        raise UserError(
            f"no preference pair in {len(scored)} prompts: all responses to each prompt have equal "
            f"rewards; check the reward, or sample more (generation.num_generations) or hotter"
        )
    return pairs


def _update(run: RunFolder, name: str, policy: Policy, pairs, seed: int, path) -> None:
    rows = policy.update(pairs, seed=seed)
    write_jsonl(run.path / name / "training.jsonl", rows)
    policy.save(path)
