"""What the stages share: common options, reading what the stage before wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast.errors import UserError
from rlhf_fast.io import Record, check_writable, read_records
from rlhf_fast.launch import several_processes
from rlhf_fast.models.card import Card
from rlhf_fast.models.names import check_model_name
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.parts import compute_of
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.reward_stage import ready_scorer
from rlhf_fast.rewards import Compute, Scorer, ShapedScorer, ShapingConfig
from rlhf_fast.rewards.shaping import mean_baseline
from rlhf_fast.rows import RowOptions, RowReport
from rlhf_fast.training.session import ComputeOptions
from rlhf_fast.types import ScoredGroup, scored_group_from_json

Records = TypeVar("Records")


@dataclass(frozen=True)
class Stage(ComputeOptions):
    """What every stage has."""

    output: str = ""
    """File or model directory to write; it must not exist."""
    seed: int = 0
    """Seed of everything random."""

    def start(self, *required: str) -> Path:
        """Checks that the required options are given; returns the path to write to."""
        if several_processes():
            raise UserError(
                "a stage is the work of one process; launch `online`, or `python -m "
                "rlhf_fast.training`, which share theirs"
            )
        for name in (*required, "output"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing")
        return new_output(self.output)

    def compute(self) -> Compute:
        return compute_of(self)

    def card(self, method: str, config: Any, metrics: dict[str, Any], **data: str) -> Card:
        """Of the model that the stage makes from `model`."""
        settings = {**asdict(config), "seed": self.seed}
        return Card(method, type(self).__doc__, [self.model], data, settings, metrics)


@dataclass(frozen=True)
class RowStage(Stage, RowOptions):
    """A stage that reads rows of the user's."""

    def read(self, load: Callable[..., Records], *sources: str) -> Records:
        """What `load` makes of the rows; tells of those that are left out."""
        report = RowReport()
        records = load(*sources, **self.reading(report))
        for line in report.lines():
            Progress().note(line)
        return records


def new_output(output: str) -> Path:
    """The path, once it is known that it is free and can be written, before any work."""
    path = Path(output)
    if path.exists():
        raise UserError(f"output {path} exists: remove it or choose another --output")
    check_writable(path)
    return path


def make_scorer(
    reward: RewardConfig, compute: Compute, seed: int, *, output: Path, baseline: str | None = None
) -> Scorer:
    """The shaped scorer of a configuration that needs no training.

    A judge's answers are kept beside the stage's `output`.
    """
    if not reward.sources():
        raise UserError("no reward: give --reward.model DIRECTORY or --reward.function module:name")
    reward.check_used()
    if reward.trains:
        raise UserError("this stage trains nothing: make a reward model with `rlhf-fast reward`")
    if bool(baseline) != bool(reward.shaping.baseline_samples):
        raise UserError("--baseline and reward.shaping.baseline_samples go together")
    for argument, name in reward.model_names().items():
        check_model_name(name, argument)
    answers = output.with_name(f"{output.name}.judge_answers.jsonl")
    scorer = ready_scorer(reward, compute, seed=seed, answers=answers)
    if reward.shaping == ShapingConfig():
        return scorer
    means = mean_baseline(read_scored(baseline)) if baseline else {}
    return ShapedScorer(scorer, reward.shaping, means)


def read_scored(path: str) -> list[ScoredGroup]:
    return records_of(path, scored_group_from_json)


def records_of(path: str, from_json: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """Records of a stage's file, at least one."""
    records = read_records(Path(path), from_json)
    if not records:
        raise UserError(f"{path}: has no rows")
    return records
