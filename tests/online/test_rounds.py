"""Rounds of sampling: other prompts take the place of those that teach nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.rounds import prompts_of_round
from rlhf_fast.online.selectors import SelectionConfig
from rlhf_fast.online.workflow import run_online
from rlhf_fast.recipes import METHODS
from rlhf_fast.types import Prompt, ScoredGroup
from tests.online.helpers import kill_and_resume, rows_of, rows_without_times
from tests.records import completion

PROMPTS = [Prompt(str(i), [{"role": "user", "content": "x"}]) for i in range(10)]


def configured(rule, **data):
    config = OnlineConfig()
    data = replace(config.data, prompts_per_iteration=4, max_rounds=3, **data)
    algorithm = "dpo" if rule.makes_pairs else "rl"
    return replace(config, data=data, selection=rule, algorithm=algorithm)


def scored(prompts, teaches):
    return [
        ScoredGroup(
            p,
            [replace(completion(f"w2{k}"), prompt=p) for k in range(2)],
            [1.0, 1.0 - (p.id in teaches)],
        )
        for p in prompts
    ]


@pytest.mark.parametrize(
    "rule",
    [SelectionConfig(), SelectionConfig("all", drop_equal_groups=True)],
    ids=["pairs", "all"],
)
def test_prompts_that_teach_nothing_are_replaced(rule):
    config = configured(rule)
    first = prompts_of_round(PROMPTS, 2, [], config, seed=5)
    assert [p.id for p in first] == ["4", "5", "6", "7"]
    groups = scored(first, {"4", "7"})
    second = prompts_of_round(PROMPTS, 2, groups, config, seed=5)
    assert len(second) == 2 and not {p.id for p in second} & {p.id for p in first}
    assert second == prompts_of_round(PROMPTS, 2, groups, config, seed=5)
    other = [prompts_of_round(PROMPTS, 2, groups, config, seed=s) for s in range(6)]
    assert any(prompts != second for prompts in other)
    groups += scored(second, set())
    third = prompts_of_round(PROMPTS, 2, groups, config, seed=5)
    assert len({p.id for p in first + second + third}) == 8
    groups += scored(third, {p.id for p in third})
    assert prompts_of_round(PROMPTS, 2, groups, config, seed=5) == []  # full


def test_prompts_may_run_out():
    config = configured(SelectionConfig())
    groups = scored(PROMPTS[:9], set())
    assert prompts_of_round(PROMPTS, 1, groups, config, seed=0) == [PROMPTS[9]]
    assert prompts_of_round(PROMPTS, 1, scored(PROMPTS, set()), config, seed=0) == []


def test_a_run_fills_its_iterations(config):
    """DAPO: the reward tells some prompts' responses apart, and others' not."""
    config = config_with(config, METHODS["dapo"][1], "test")
    config = config_with(
        config,
        {
            "reward": {"function": "helpers:varied_for_some"},
            "data": {"prompts_per_iteration": 4, "max_rounds": 4},
            "rl": {"optimizer": {"batch_size": 2}},
        },
        "test",
    )
    whole = replace(config, output_dir=config.output_dir + "_whole")
    run_online(whole)
    run = Path(whole.output_dir)
    rows = rows_without_times(run)
    for iteration in (1, 2):
        folder = run / f"iteration_{iteration}"
        rounds = [rows_of(path) for path in sorted(folder.glob("scored*.jsonl"))]
        sizes = [len(groups) for groups in rounds]
        assert sizes[0] == 4 and len(sizes) > 1
        ids = [g["prompt"]["id"] for groups in rounds for g in groups]
        assert len(set(ids)) == len(ids)
        kept = rows_of(folder / "selected.jsonl")
        assert len(kept) == 4 and all(len(set(g["rewards"])) > 1 for g in kept)
        assert rows[iteration]["num_ties"] == sum(sizes) - 4
        assert len(rows_of(folder / "training.jsonl")) == 2  # full batches
    for when in ("start", "end"):
        killed = replace(config, output_dir=f"{config.output_dir}_{when}")
        assert kill_and_resume(killed, "iteration_1/scored_2", when) == rows


def test_mistakes():
    with pytest.raises(UserError, match="max_rounds 3 needs data.prompts_per_iteration"):
        config_with(OnlineConfig(), {"data": {"max_rounds": 3}}, "test")
    with pytest.raises(UserError, match="data.max_rounds must be >= 1, got 0"):
        config_with(OnlineConfig(), {"data": {"max_rounds": 0}}, "test")
    for more in (
        {"overlap": True},
        {"algorithm": "nll", "selection": {"rule": "batch_top"}},
        {"generation": {"sampler": {"kind": "multi_turn"}}},
    ):
        with pytest.raises(UserError, match="data.max_rounds"):
            config_with(configured(SelectionConfig()), more, "test")
