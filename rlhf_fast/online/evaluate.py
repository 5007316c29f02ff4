"""Held-out evaluation: judge, win rate against the SFT model, KL, length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_fast.online.metrics import (
    mean_reward,
    overoptimisation_warnings,
    response_metrics,
    win_rate,
)
from rlhf_fast.online.protocols import Generator, Policy
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.rewards import Scorer
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import Prompt, scored_group_from_json


class Evaluator:
    """Samples responses to held-out prompts and compares them with iteration 0's.

    Wins are decided by `judge` where there is one, else by the reward that the policy trains on.
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
    ) -> None:
        self.run = run
        self.prompts = prompts
        self.generator = generator
        self.scorer = scorer
        self.judge = judge
        self.num_generations = num_generations
        self.seed = derive_seed(seed, "evaluate")

    def evaluate(self, iteration: int, policy: Policy) -> dict[str, Any]:
        """One row of metrics.jsonl."""
        name = f"iteration_{iteration}/evaluation"
        judged = self.run.records(name, scored_group_from_json, self._sample)
        groups = [group.completions for group in judged]
        baseline = self.run.records("iteration_0/evaluation", scored_group_from_json, self._sample)
        rate, stderr = win_rate(judged, baseline) if iteration else (0.5, 0.0)
        row = {
            "iteration": iteration,
            "reward": mean_reward(self.scorer.score(groups)),
            "gold": mean_reward(judged) if self.judge else None,
            "win_rate": rate,
            "win_rate_stderr": stderr,
            "kl": policy.kl(groups) if iteration else 0.0,
            **response_metrics(groups),
            "seconds_evaluate": self.run.seconds(name),
        }
        row["warnings"] = overoptimisation_warnings([*self.run.metrics(), row])
        return row

    def _sample(self) -> list:
        groups = self.generator.generate(
            self.prompts, num_generations=self.num_generations, seed=self.seed
        )
        return (self.judge or self.scorer).score(groups)
