"""The reward model trained again on the policy's samples, in a run that may be killed."""

import math
from dataclasses import replace

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.reward_refresh import RefreshConfig
from rlhf_fast.online.workflow import run_online
from rlhf_fast.training.reward_config import RewardTrainingConfig
from tests.online.helpers import (
    kill_and_resume,
    pair_rows,
    rows_of,
    rows_without_times,
    write_rows,
)

SHORTER = "helpers:shorter_is_better"


def refreshing(config, **options):
    training = RewardTrainingConfig(parameters="head", holdout_share=0.0)
    reward = RewardConfig(labeller=SHORTER, training=training, refresh=RefreshConfig(**options))
    return replace(config, reward=reward)


def test_pairs_it_is_sure_of_make_the_next_reward_model(config, tmp_path):
    """Iteration 2 labels by iteration 1's model and learns from the pairs of both."""
    run = tmp_path / "run"
    run_online(refreshing(config, labels="own", confidence=0.6))
    first, second = (rows_of(run / f"iteration_{k}/reward_pairs.jsonl") for k in (1, 2))
    gaps = [p["chosen_reward"] - p["rejected_reward"] for p in (*first, *second)]
    assert gaps and min(gaps) >= math.log(0.6 / 0.4)
    given = len(rows_of(run / "reward_model/pairs.jsonl"))
    counts = [
        rows_of(run / f"iteration_{k}/metrics_reward_model.jsonl")[0]["num_pairs"] for k in (1, 2)
    ]
    assert counts == [given + len(first), given + len(first) + len(second)]
    labels = {p["chosen"]["text"]: p["chosen_reward"] for p in first}
    scored = [
        (c["text"], r)
        for group in rows_of(run / "iteration_1/scored.jsonl")
        for c, r in zip(group["completions"], group["rewards"])
    ]
    assert any(labels[text] != reward for text, reward in scored if text in labels)


def test_what_is_new_is_learned_and_not_held_out(config, tmp_path):
    """Held out are given pairs, the last ones, whatever the policy's samples add."""
    run, given = tmp_path / "run", pair_rows()
    reward = RewardConfig(
        pairs=write_rows(tmp_path / "pairs.jsonl", given),
        training=RewardTrainingConfig(parameters="head", holdout_share=0.1),
        refresh=RefreshConfig("own", confidence=0.501),
    )
    run_online(replace(config, reward=reward, num_iterations=1))
    new = rows_of(run / "iteration_1/reward_pairs.jsonl")
    (row,) = rows_of(run / "iteration_1/metrics_reward_model.jsonl")
    prompts = len(given) + len({pair["chosen"]["prompt"]["id"] for pair in new})
    assert row["num_held_out_pairs"] == prompts // 10
    assert row["num_pairs"] == len(given) + len(new) - prompts // 10


def test_the_labeller_labels_the_policys_samples(config, tmp_path):
    config = replace(refreshing(config, labels="labeller"), num_iterations=1)
    expected = run_online(config).parent
    for pair in rows_of(expected / "iteration_1/reward_pairs.jsonl"):
        assert pair["chosen_reward"] == -len(pair["chosen"]["text"])
    rows = rows_without_times(expected)
    again = replace(config, output_dir=str(tmp_path / "again"))
    assert kill_and_resume(again, "iteration_1/reward_model", "start") == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh": {"labels": "labeller"}, "pairs": "P"}, "labeller needs reward.labeller"),
        (
            {"refresh": {"labels": "own"}, "pairs": "P", "ensemble": {"members": 2}},
            "of one reward model of objective pairs or segments, got 2 of pairs",
        ),
        (
            {"refresh": {"labels": "own"}, "pairs": "P", "shaping": {"baseline_samples": 2}},
            "are those of the first reward model",
        ),
    ],
)
def test_what_cannot_be_refreshed_is_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        config_with(config, {"reward": {"function": None} | changes}, "test").check_complete()


def test_bad_confidence():
    with pytest.raises(UserError, match=r"must be in \(0.5, 1\), got 1.0"):
        RefreshConfig("own", 1.0)
