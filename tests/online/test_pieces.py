"""Selectors, metrics, seeds and configuration: exact expectations."""

import math
from dataclasses import replace

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import GenerationConfig, OnlineConfig, RewardConfig
from rlhf_fast.online.config_file import config_from_yaml, config_to_yaml
from rlhf_fast.online.metrics import (
    length_correlation,
    overoptimisation_warnings,
    response_metrics,
    win_rate,
)
from rlhf_fast.online.reward_stage import pairs_by_gap
from rlhf_fast.online.rounds import prompts_of_iteration
from rlhf_fast.recipes import RECIPES
from rlhf_fast.rewards.config import PartConfig
from rlhf_fast.rewards.shaping import ShapingConfig
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import ScoredGroup
from tests.records import completion, scored


def test_labelled_pairs_are_the_widest_gaps_above_the_minimum():
    config = RewardConfig(labelled_min_gap=0.5, labelled_max_pairs_per_prompt=2)
    pairs = pairs_by_gap(scored(0.0, 0.4, 2.0), config, config.labelled_min_gap)
    assert [(p.chosen_reward, p.rejected_reward) for p in pairs] == [(2.0, 0.0), (2.0, 0.4)]


def test_win_rate_counts_every_meeting_and_halves_ties():
    ours, theirs = [scored(1, 3), scored(0, 0)], [scored(2, 1), scored(0, 0)]
    rate, stderr = win_rate(ours, theirs)  # prompt 1: (0 + .5 + 1 + 1) / 4; prompt 2: ties
    assert rate == pytest.approx((0.625 + 0.5) / 2)
    assert stderr == pytest.approx(0.125 / 2)


def test_response_metrics():
    group = scored(0, 0, texts=["a b a b", "c d e"]).completions
    metrics = response_metrics([group])
    assert metrics == {
        "length_tokens": 2.0,
        "finished_share": 1.0,
        "distinct_2": pytest.approx((2 / 3 + 1) / 2),
        "duplicate_rate": 0.0,
        "entropy": None,
    }


def row(**changes):
    base = {"iteration": 0, "reward": 1.0, "gold": 0.5, "finished_share": 0.9, "distinct_2": 0.95}
    return base | changes


def test_overoptimisation_warning():
    assert overoptimisation_warnings([row(), row(reward=2.0, gold=0.6)]) == []
    (warning,) = overoptimisation_warnings([row(), row(reward=2.0, gold=0.3)])
    assert warning.startswith("over-optimisation")
    assert len(overoptimisation_warnings([row(), row(finished_share=0.2, distinct_2=0.5)])) == 2


def test_overoptimisation_is_seen_across_iterations():
    """Slow erosion: each step is noise, but since iteration 1 reward and judge part ways."""
    rows = [row(gold=0.2, reward=0.5), row(iteration=1, gold=0.6), row(gold=0.5, reward=0.9)]
    assert overoptimisation_warnings(rows) == []
    (warning,) = overoptimisation_warnings([*rows, row(gold=0.55, reward=1.5)])
    assert warning.startswith("over-optimisation since iteration 1")


def test_duplicates_and_entropy_and_length():
    groups = [
        scored(0, 0, 0, texts=["a", "a", "b"]).completions,
        scored(0, texts=["a"]).completions,
    ]
    groups[1] = [replace(groups[1][0], sampling_logps=[-1.0, -3.0])]
    metrics = response_metrics(groups)
    assert metrics["duplicate_rate"] == pytest.approx((1 / 3 + 0) / 2)
    assert metrics["entropy"] == 2.0
    longer = [completion("x", num_tokens=n) for n in (2, 4, 6)]
    group = ScoredGroup(longer[0].prompt, longer, [0.0, 1.0, 2.0])
    assert length_correlation([group]) == pytest.approx(1.0)
    assert length_correlation([replace(group, rewards=[1.0, 1.0, 1.0])]) == 0.0
    assert length_correlation([replace(group, rewards=[1.0, 0.0, 1.0])]) == pytest.approx(0.0)


def test_prompts_of_an_iteration_continue_and_wrap():
    config = OnlineConfig()
    prompts = list(range(5))
    assert prompts_of_iteration(prompts, 2, config) == [0, 1, 2, 3, 4]
    import dataclasses

    data = dataclasses.replace(config.data, prompts_per_iteration=2)
    config = dataclasses.replace(config, data=data)
    assert [prompts_of_iteration(prompts, i, config) for i in (1, 2, 3)] == [[0, 1], [2, 3], [4, 0]]


def test_seeds_depend_on_every_name():
    seeds = {derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "a", 2)}
    assert len(seeds) == 3 and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_yaml(name, tmp_path):
    config = RECIPES[name]()
    config.check_complete()
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert config_from_yaml(path, OnlineConfig()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_iteration: 3", "unknown key `num_iteration`; did you mean `num_iterations`"),
        ("dpo: {beta: high}", "`dpo.beta` must be float, got 'high'"),
        ("dpo: {beta: -1}", "dpo.beta must be > 0, got -1"),
        ("dpo: 3", "`dpo` must be a mapping, got 3"),
        (
            "selection: {rule: best}",
            "`selection.rule` must be one of best_vs_worst, best_vs_random",
        ),
        ("reward: {parts: 3}", "`reward.parts` must be a list, got 3"),
        ("reward: {parts: [3]}", "`reward.parts`: each item must be a mapping, got 3"),
        ("reward: {parts: [{nam: a}]}", "unknown key `nam`; did you mean `name`?"),
        ("reward: {parts: [{name: a}]}", "each part needs a name and one source, got name 'a'"),
        ("reward: {models: [1]}", "`reward.models` must be str, got 1"),
        ("selection: {min_reward: 1}", "selection.min_reward: rule best_vs_worst makes no use of"),
        ("selection: {rule: top, min_gap: 1}", "selection.min_gap: rule top makes no use of it"),
        ("reference: {decay: 0.9}", "reference.decay: rule sft makes no use of it, got 0.9"),
        ("list: {loss_type: pro, beta: 0.5}", "list.beta: loss_type pro makes no use of it"),
        (
            "generation: {sampler: {strength: 0.5}}",
            "sampler.strength: kind plain makes no use of it, got 0.5; leave it out",
        ),
        ("rl: {covariance: {low: 0.5}}", "rl.covariance.low: rule none makes no use of it"),
        ("reward: {weak_model: a}", "weak_model goes with strong_model"),
        ("reward: {composition: {gate: a}}", "`gate` and combination `gated` go together"),
        ("[1, 2]", "must be a mapping of settings, got [1, 2]"),
        ("", "must be a mapping of settings, got None"),
        ("dpo: {optimizer: {lr: 1e-6}}", "unknown key `dpo.optimizer.lr`; known: learning_rate, "),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_names_what_came(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config_from_yaml(path, OnlineConfig())
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Is a directory"):
        config_from_yaml(tmp_path, OnlineConfig())
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(UserError, match="latin.yaml: not UTF-8 text"):
        config_from_yaml(tmp_path / "latin.yaml", OnlineConfig())


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dpo: {optimizer: {learning_rate: 5e-7}}")
    assert math.isclose(config_from_yaml(path, OnlineConfig()).dpo.optimizer.learning_rate, 5e-7)


def test_best_vs_worst_needs_two_generations():
    with pytest.raises(UserError, match="best_vs_worst needs .* >= 2, got 1"):
        OnlineConfig(generation=GenerationConfig(num_generations=1))


def test_one_source_of_rewards():
    with pytest.raises(UserError, match="give one of .* got function, model; .*--reward.NAME None"):
        RewardConfig(function="a:b", model="c")


def test_parts_survive_yaml(tmp_path):
    parts = (
        PartConfig(name="a", function="m:f", weight=2.0),
        PartConfig(name="b", model="dir", is_constraint=True, threshold=0.5),
    )
    config = OnlineConfig(reward=RewardConfig(parts=parts, shaping=ShapingConfig(lowest=-1.0)))
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert config_from_yaml(path, OnlineConfig()) == config
