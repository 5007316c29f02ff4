"""The evaluation stage: win rates, best-of-n, accuracy of a reward."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlhf_fast.data import load_preference_pairs
from rlhf_fast.errors import UserError
from rlhf_fast.io import write_atomic
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.metrics import (
    best_of_n,
    length_controlled_win_rate,
    mean_reward,
    pair_accuracy,
    response_metrics,
    win_rate,
)
from rlhf_fast.online.reward_bench import section_scores
from rlhf_fast.online.stages.base import Stage, make_scorer, read_scored
from rlhf_fast.types import Completion, Message, ScoredGroup


@dataclass(frozen=True)
class Evaluate(Stage):
    """Evaluation: scored groups, or pairs and a reward -> metrics (.json)."""

    scored: str | None = None
    """Scored responses of the model (what `score` wrote)."""
    baseline: str | None = None
    """Scored responses of the baseline to the same prompts, by the same reward. Rewards that only
    compare the responses of one file, as of a pairwise model, tell nothing about the other."""
    pairs: str | None = None
    """Instead: preference pairs (RewardBench's format, with an optional field `subset`) on which
    the reward's accuracy is measured, by RewardBench's sections too; strong_model and weak_model
    give DPO's implicit reward."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward to be measured on `pairs`."""

    def run(self) -> str:
        path = self.start()
        if bool(self.scored) == bool(self.pairs):
            raise UserError("give --scored FILE (with or without --baseline) or --pairs FILE")
        metrics = self._accuracy(path) if self.pairs else self._metrics()
        write_atomic(path, json.dumps(metrics, indent=1) + "\n")
        shown = {k: round(v, 4) for k, v in metrics.items() if isinstance(v, float)}
        return f"metrics: {path}\n" + "\n".join(f"  {name}: {v}" for name, v in shown.items())

    def _metrics(self) -> dict[str, Any]:
        scored = read_scored(self.scored)
        groups = [group.completions for group in scored]
        metrics = {"reward": mean_reward(scored), **response_metrics(groups)}
        metrics["best_of_n"] = best_of_n(scored)
        if not self.baseline:
            return metrics
        by_prompt = {group.prompt.id: group for group in read_scored(self.baseline)}
        missing = [g.prompt.id for g in scored if g.prompt.id not in by_prompt]
        if missing:
            raise UserError(f"{self.baseline}: no responses to prompt {missing[0]!r}")
        for group in scored:
            if _asked(group) != _asked(by_prompt[group.prompt.id]):
                raise UserError(
                    f"{self.baseline}: its prompt {group.prompt.id!r} is another one than that of "
                    f"{self.scored}; give the baseline's responses to the same prompts"
                )
        theirs = [by_prompt[group.prompt.id] for group in scored]
        metrics["win_rate"], metrics["win_rate_stderr"] = win_rate(scored, theirs)
        metrics["length_controlled_win_rate"] = length_controlled_win_rate(scored, theirs)
        return metrics

    def _accuracy(self, output: Path) -> dict[str, Any]:
        pairs = load_preference_pairs(self.pairs)
        groups = [
            [Completion(p.prompt, text, [], [], True) for text in (p.chosen, p.rejected)]
            for p in pairs
        ]
        scored = make_scorer(self.reward, self.compute(), self.seed, output=output).score(groups)
        metrics: dict[str, Any] = {"accuracy": pair_accuracy(scored), "num_pairs": len(scored)}
        subsets: dict[str, list[ScoredGroup]] = {}
        for group in scored:
            subsets.setdefault(str(group.prompt.metadata.get("subset", "all")), []).append(group)
        accuracies = {name: pair_accuracy(groups) for name, groups in sorted(subsets.items())}
        metrics |= {f"accuracy/{name}": accuracy for name, accuracy in accuracies.items()}
        return metrics | section_scores(accuracies)


def _asked(group: ScoredGroup) -> list[Message]:
    """The prompt up to the first answer: those of later turns follow answers of their own."""
    return list(takewhile(lambda m: m["role"] != "assistant", group.prompt.messages))
