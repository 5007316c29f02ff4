"""Which prompts are sampled: those of an iteration, then others for those that teach nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.selectors import select
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import PreferencePair, Prompt, ScoredGroup


def prompts_of_iteration(
    prompts: Sequence[Prompt], iteration: int, config: OnlineConfig
) -> list[Prompt]:
    """This iteration's share of the prompts; the next iteration goes on where this one ends."""
    count = config.data.prompts_per_iteration or len(prompts)
    start = (iteration - 1) * count
    return [prompts[(start + i) % len(prompts)] for i in range(min(count, len(prompts)))]


def prompts_of_round(
    prompts: Sequence[Prompt],
    iteration: int,
    scored: Sequence[ScoredGroup],
    config: OnlineConfig,
    *,
    seed: int,
) -> list[Prompt]:
    """The prompts that an iteration samples next, having scored these groups; none if it is full.

    After the first round they take the place of prompts from which nothing is selected, drawn from
    those that were not sampled in this iteration. Source: dynamic sampling, DAPO, arXiv 2503.14476,
    section 3.2.
    """
    first = prompts_of_iteration(prompts, iteration, config)
    if not scored:
        return first
    useful = {_prompt_id(record) for record in select(scored, config.selection, seed=seed)}
    others = list(prompts)
    random.Random(derive_seed(seed, "rounds")).shuffle(others)
    seen = {group.prompt.id for group in scored} | {prompt.id for prompt in first}
    return [p for p in others if p.id not in seen][: len(first) - len(useful)]


def round_name(stage: str, number: int) -> str:
    """Of a stage's file: the first round's has the plain name."""
    return stage if number == 1 else f"{stage}_{number}"


def _prompt_id(record: PreferencePair | ScoredGroup) -> str:
    return (record.chosen if isinstance(record, PreferencePair) else record).prompt.id
