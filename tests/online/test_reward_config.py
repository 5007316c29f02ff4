"""Rewards that cannot work are refused before any work, whatever method asks for them."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.config_file import config_from_yaml, config_with
from rlhf_fast.online.workflow import run_online
from rlhf_fast.recipes import METHODS
from rlhf_fast.rewards.config import PartConfig
from tests.online.helpers import pair_rows, prompt_rows, rows_of, write_rows
from tests.online.test_reward_training import score_rows

JUDGE = {"url": "http://127.0.0.1:1/v1", "model": "m"}
SOURCES = {
    "function": {"function": "helpers:varied"},
    "rule": {"rule": {"kind": "format"}},
    "model": {"model": "M"},
    "models": {"models": ["M", "N"]},
    "pairwise_model": {"pairwise_model": "M"},
    "density": {"strong_model": "M", "weak_model": "N"},
    "judge": {"judge": JUDGE},
    "pairs": {"pairs": "P"},
    "scores": {"scores": "S"},
    "labeller": {"labeller": "helpers:varied"},
}
TRAINED = {"pairs", "scores", "labeller"}
NEEDS = {
    **dict.fromkeys(("wco", "uwo", "lcb-ensemble", "reward-robust"), {"model", "models", *TRAINED}),
    "lcb-heads": {"model", "models", *TRAINED},
    "maxmin": {"model", "models"},
    "pairwise-model": {"pairwise_model", *TRAINED},
    **dict.fromkeys(
        ("qrm", "armorm", "segrm", "k-wise", "rluf", "ids"),
        {"model", "models", "pairwise_model", *TRAINED},
    ),
    **dict.fromkeys(
        ("conservative-labels", "contrastive-features"),
        {"model", "models", "pairwise_model", *TRAINED},
    ),
    "nash-md": {"pairwise_model", "judge"},
    **dict.fromkeys(("rlaif", "d-rlaif", "genrm", "rlbff"), {"judge"}),
    **dict.fromkeys(("preference-votes", "ser"), {"pairs", "labeller"}),
    **dict.fromkeys(("clip-steps", "delta-steps"), {"function"}),
    **dict.fromkeys(("cgpo", "heron"), set()),  # parts
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_takes_the_rewards_that_it_changes_and_no_others(method):
    for source, reward in SOURCES.items():
        config = config_with(OnlineConfig(), {"reward": reward}, source)
        config = replace(config, model="M", data=replace(config.data, prompts="P"))
        config = config_with(config, METHODS[method][1], method)
        if source in NEEDS.get(method, SOURCES):
            config.check_complete()
        else:
            with pytest.raises(UserError, match=r"goes with|several opinions"):
                config.check_complete()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "PAIRS", "training": {"objective": "attributes"}}, "learns from scored"),
        ({"scores": "SCORES"}, "learns from preference pairs, got none"),
        ({"scores": "SCORES", "training": {"objective": "quantiles"}}, "is of one score"),
        (
            {"pairs": "PAIRS", "training": {"objective": "segments"}, "ensemble": {"members": 2}},
            "takes reward.ensemble.members 1",
        ),
        ({"pairs": "PAIRS", "ensemble": {"reduction": "min"}}, "needs several opinions"),
        (
            {
                "pairs": "PAIRS",
                "scores": "SCORES",
                "training": {"objective": "attributes"},
                "ensemble": {"reduction": "min"},
            },
            "without the gate that reward.pairs train",
        ),
        ({"judge": JUDGE, "ranking": "opponents"}, "sampler.kind must be mixture or pilaf"),
    ],
)
def test_a_reward_that_cannot_be_made_is_refused_before_any_work(config, changes, message):
    folder = Path(config.output_dir).parent
    files = {
        "PAIRS": write_rows(folder / "pairs.jsonl", pair_rows()),
        "SCORES": write_rows(folder / "scores.jsonl", score_rows()),
    }
    given = {k: files.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        run_online(config_with(config, {"reward": {"function": None} | given}, "test"))
    assert not Path(config.output_dir).exists()


def test_later_turns_have_no_baseline():
    changes = {
        "generation": {"sampler": {"kind": "multi_turn"}},
        "reward": {"shaping": {"baseline_samples": 2}},
    }
    with pytest.raises(UserError, match="later turns have no baseline"):
        config_with(OnlineConfig(), changes, "test")


def test_parts_are_checked_too(config):
    part = PartConfig(name="a", function="helpers:varied", ranking="tournament")
    reward = replace(config.reward, function=None, parts=(part,))
    with pytest.raises(UserError, match="reward.ranking goes with pairwise_model"):
        replace(config, reward=reward).check_complete()


def test_a_column_named_as_an_argument_stays_behind(config):
    """UltraFeedback's rows bring `completions`."""
    rows = [row | {"completions": [], "finished": 1} for row in prompt_rows()]
    prompts = write_rows(Path(config.output_dir).parent / "rows.jsonl", rows)
    config = replace(config, num_iterations=1, data=replace(config.data, prompts=prompts))
    run_online(config)


def test_rules_are_parts_of_a_reward(config):
    """Their settings reach the run, whose scores say what each rule gave."""
    text = """
reward:
  function: null
  parts:
    - {name: short, rule: {kind: overlong, max_tokens: 8, buffer_tokens: 8}}
    - {name: dull, rule: {kind: repetition, ngram_words: 1}, weight: 0.5}
    - {name: right, rule: {kind: number, column: target}}
"""
    path = Path(config.output_dir).parent / "rules.yaml"
    path.write_text(text)
    config = config_from_yaml(path, replace(config, num_iterations=1))
    run_online(config)
    for group in rows_of(Path(config.output_dir) / "iteration_1/scored.jsonl"):
        lengths = [len(c["token_ids"]) for c in group["completions"]]
        parts = group["components"]
        assert parts["short"] == [-length / 8 for length in lengths]
        assert group["rewards"] == pytest.approx(
            [a + b / 2 + c for a, b, c in zip(parts["short"], parts["dull"], parts["right"])]
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"rule": {"kind": "number", "column": "solution"}},
            "has no field 'solution' with the right",
        ),
        ({"judge": JUDGE | {"mode": "entail"}}, "entail needs judge.principles"),
    ],
)
def test_rows_without_what_the_reward_needs_are_refused_before_any_work(config, source, message):
    with pytest.raises(UserError, match=message):
        run_online(config_with(config, {"reward": {"function": None} | source}, "test"))
    assert not Path(config.output_dir).exists()
