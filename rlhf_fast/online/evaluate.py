"""Held-out evaluation: judge, win rate against the SFT model, KL, length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.online.metrics import (
    length_correlation,
    mean_and_error,
    mean_component,
    mean_reward,
    overoptimisation_warnings,
    response_metrics,
    win_rate,
)
from rlhf_fast.online.protocols import Generator, Policy
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.rewards import Scorer, ShapedScorer
from rlhf_fast.rewards.scorer import WINS, is_relative, score_against, score_together
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import Group, Prompt, ScoredGroup, scored_group_from_json

REWARD = "policy_reward"
"""Component of a judged response: the reward that the policy trains on."""


class Evaluator:
    """Samples responses to held-out prompts and compares them with iteration 0's.

    Wins are decided by `judge` where there is one, else by the reward that the policy trains on,
    before it is standardised. Where that only compares responses, as a pairwise model does, the
    responses meet iteration 0's, and the reward is their mean winning probability.
    Every iteration draws with the same seed, so differences come from the policy.
    """

    def __init__(
        self,
        run: RunFolder,
        prompts: Sequence[Prompt],
        *,
        generator: Generator,
        scorer: Scorer,
        judge: Scorer | None,
        num_generations: int,
        seed: int,
        starts_at_reference: bool = True,
    ) -> None:
        self.run = run
        self.prompts = prompts
        self.generator = generator
        self.scorer = scorer.unstandardised() if isinstance(scorer, ShapedScorer) else scorer
        self.judge = judge
        self.num_generations = num_generations
        self.seed = derive_seed(seed, "evaluate")
        self.starts_at_reference = starts_at_reference
        self.first: list[ScoredGroup] | None = None

    def evaluate(self, iteration: int, policy: Policy) -> dict[str, Any]:
        """One row of metrics.jsonl."""
        folder = f"iteration_{iteration}"
        if iteration:
            self._check_same_prompts()
        judged = self._responses(iteration)
        groups = [group.completions for group in judged]
        rate, stderr = self._win_rate(judged) if iteration else (0.5, 0.0)
        kl = 0.0
        if iteration or not self.starts_at_reference:
            kl = self.run.timed(f"{folder}/kl", lambda: policy.kl(groups))
        row = {
            "iteration": iteration,
            "reward": mean_component(judged, REWARD) if self.judge else mean_reward(judged),
            "gold": mean_reward(judged) if self.judge else None,
            "win_rate": rate,
            "win_rate_stderr": stderr,
            "kl": kl,
            "sqrt_kl": math.sqrt(max(0.0, kl)),
            **response_metrics(groups),
            "length_correlation": length_correlation(judged),
            "seconds_evaluate": self.run.seconds(f"{folder}/evaluation"),
        }
        row["warnings"] = overoptimisation_warnings([*self.run.metrics(), row])
        return row

    def _responses(self, iteration: int) -> list[ScoredGroup]:
        return self.run.records(
            f"iteration_{iteration}/evaluation",
            scored_group_from_json,
            lambda: self._sample(iteration),
        )

    def _baseline(self) -> list[ScoredGroup]:
        """Iteration 0's responses, read once."""
        if self.first is None:
            self.first = self._responses(0)
        return self.first

    def _win_rate(self, judged: Sequence[ScoredGroup]) -> tuple[float, float]:
        if all(WINS in group.components for group in judged):
            return mean_and_error([statistics.fmean(g.components[WINS]) for g in judged])
        return win_rate(judged, self._baseline())

    def _check_same_prompts(self) -> None:
        ours = [prompt.messages for prompt in self.prompts]
        if ours != [group.prompt.messages for group in self._baseline()]:
            raise UserError(
                f"{self.run.path}: the held-out prompts are not those of iteration 0, so nothing "
                f"can be compared; give the run its prompts back, or start a new one"
            )

    def _sample(self, iteration: int) -> list[ScoredGroup]:
        groups = self.generator.generate(
            self.prompts, num_generations=self.num_generations, seed=self.seed
        )
        scored = self._scored(groups, iteration)
        if self.judge is None:
            return scored
        judged = score_together(self.judge, groups, self.run.launch)
        return [
            replace(j, components={**j.components, REWARD: s.rewards})
            for j, s in zip(judged, scored)
        ]

    def _scored(self, groups: list[Group], iteration: int) -> list[ScoredGroup]:
        scorer, launch = self.scorer, self.run.launch
        if not is_relative(scorer):
            return score_together(scorer, groups, launch)
        opponents = [group.completions for group in self._baseline()] if iteration else groups
        return launch.on_main(lambda: score_against(scorer, groups, opponents))
