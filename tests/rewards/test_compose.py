"""Composition and shaping: every rule on numbers that can be checked by hand."""

import math

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.launch import Launch
from rlhf_fast.rewards import (
    ComposedScorer,
    EnsembleScorer,
    FunctionScorer,
    Part,
    RuleConfig,
    RuleScorer,
    ShapedScorer,
    ShapingConfig,
    score_together,
)
from rlhf_fast.rewards.compose import constrained, hierarchical, ranked, weighted
from rlhf_fast.rewards.shaping import (
    calibrated,
    clip_steps,
    clipped,
    contrastive,
    delta_steps,
    length_penalised,
    mean_baseline,
    reduce_steps,
    standardised,
)
from tests.records import completion, scored
from tests.rewards.test_ensemble import Fixed


def test_weighted():
    assert weighted([[1, 2], [10, 20]], [0.5, 2]) == [20.5, 41]


def test_hierarchical_adds_the_rest_only_above_the_threshold():
    assert hierarchical([[1, -1, 0], [5, 5, 5]], [1, 0.1], threshold=0) == [1.5, -1, 0.5]
    assert hierarchical([[1, 2]], [2], threshold=9) == [2, 4]


def test_the_first_clear_difference_decides():
    """Response 2 beats both by the first part; of the others the second part prefers response 1."""
    parts, margins = [[0.0, 0.1, 1.0], [5.0, 7.0, 6.0]], [0.5, 1.0]
    assert ranked(parts, margins) == [0.0, 0.5, 1.0]
    assert ranked(parts, [0.5, 2.0]) == [0.25, 0.25, 1.0]  # a difference of 2 is not clear
    assert ranked(parts, [0.0, 0.0]) == [0.0, 0.5, 1.0]
    assert ranked([[3.0]], [0.0]) == [0.5]


def test_a_ranked_composition_compares_and_is_told_so():
    parts = {
        "first": Part(Fixed(0.0, 0.1, 1.0), margin=0.5),
        "second": Part(Fixed(5.0, 7.0, 6.0), margin=1.0),
    }
    scorer = ComposedScorer(parts, "ranked")
    (group,) = scorer.score([[completion(text) for text in "abc"]])
    assert group.rewards == [0.0, 0.5, 1.0] and scorer.is_relative


class Noted(Launch):
    def share(self, items, compute):
        self.way = "shared out"
        return compute(list(items))

    def on_main(self, compute):
        self.way = "by the main process"
        return compute()


def test_a_launch_shares_out_what_needs_no_other_group_and_no_function():
    rule, function = RuleScorer(RuleConfig("format", pattern=".*")), Fixed(1.0)
    rules = {"a": Part(rule), "b": Part(rule, is_constraint=True)}
    shared = [rule, EnsembleScorer({"a": rule}, "mean"), ComposedScorer(rules)]
    alone = [
        function,
        EnsembleScorer({"a": rule, "b": function}, "mean"),
        ComposedScorer(rules, gate=lambda prompt: [1.0]),
        ComposedScorer({**rules, "c": Part(function)}),
        ShapedScorer(rule, ShapingConfig(standardised=True)),
    ]
    for way, scorers in {"shared out": shared, "by the main process": alone}.items():
        for scorer in scorers:
            launch = Noted()
            assert score_together(scorer, [[completion("a")]], launch)[0].rewards
            assert launch.way == way


def test_constraints_mask():
    parts = [[1, 0, 1], [0.5, 1, 0.4]]
    assert constrained([7, 8, 9], parts, [1, 0.5], violation=-1) == [7, -1, -1]
    assert constrained([7, 8], [], [], violation=-1) == [7, 8]


def test_contrastive_and_calibrated():
    assert contrastive([1, 3], 2) == [-1, 1]
    assert calibrated([0, 1]) == pytest.approx([0.5, 1 / (1 + math.exp(-1))])
    assert calibrated([-1e6, 1e6]) == pytest.approx([0, 1])


def test_standardised():
    assert standardised([1, 3]) == [-1, 1]
    assert standardised([2, 2, 2]) == [0, 0, 0]


def test_clipped_and_length_penalised():
    assert clipped([-5, 0, 5], -1, 2) == [-1, 0, 2]
    assert clipped([-5, 5]) == [-5, 5]
    assert length_penalised([1, 1], [10, 0], 0.05) == [0.5, 1]


def test_steps_clip_and_delta():
    assert clip_steps([0.9, 0.2], 0.5) == [0, -0.3]
    assert delta_steps([0.9, 0.2, 0.6]) == pytest.approx([0.7, -0.4, 0.6])
    assert reduce_steps([0.9, 0.2, 0.6], "delta") == pytest.approx(0.9)
    assert reduce_steps([0.9, 0.2], "clip", 0.5) == pytest.approx(-0.3)
    expected = {"sum": 1.1, "mean": 0.55, "min": 0.2, "last": 0.2}
    for reduction, value in expected.items():
        assert reduce_steps([0.9, 0.2], reduction) == pytest.approx(value)
    assert reduce_steps([], "min") == 0.0


def test_more_steps_cannot_raise_a_clipped_reward():
    assert reduce_steps([0.9] * 50, "clip", 0.5) == reduce_steps([0.9], "clip", 0.5) == 0


def test_a_function_may_return_step_rewards():
    def process(completions, **_):
        return [[0.5, 0.9] for _ in completions]

    (group,) = FunctionScorer(process, steps="min").score([[completion("a"), completion("b")]])
    assert group.rewards == [0.5, 0.5]
    with pytest.raises(UserError, match="must return a list of lists of step rewards"):
        FunctionScorer(lambda completions, **_: [1.0], steps="min").score([[completion("a")]])


GROUP = [completion("a"), completion("b", finished=False, num_tokens=10)]


def test_a_composition_keeps_its_parts():
    parts = {
        "helpful": Part(Fixed(1.0, 2.0)),
        "polite": Part(Fixed(0.0, 1.0), weight=0.5),
        "safe": Part(Fixed(1.0, 0.0), is_constraint=True, threshold=0.5),
    }
    (group,) = ComposedScorer(parts, violation=-9).score([GROUP])
    assert group.rewards == [1.0, -9]
    assert group.components == {
        "helpful": [1, 2],
        "polite": [0, 1],
        "safe": [1, 0],
        "unconstrained": [1.0, 2.5],
    }


def test_a_gate_weighs_by_the_prompt():
    def gate(prompt):
        return [1, 0] if prompt.id == "a" else [0.25, 0.75]

    parts = {"one": Part(Fixed(1.0)), "two": Part(Fixed(5.0))}
    groups = [[completion("x", "a")], [completion("x", "b")]]
    scores = ComposedScorer(parts, "gated", gate=gate).score(groups)
    assert [g.rewards for g in scores] == [[1.0], [4.0]]
    bad = ComposedScorer(parts, "gated", gate=lambda prompt: [1.0])
    with pytest.raises(UserError, match="one weight for each of one, two, got 1 on prompt 'a'"):
        bad.score(groups)


def test_a_violation_does_not_move_the_baseline():
    """Else every response without one would be calibrated to 1 (CGPO)."""
    parts = {"good": Part(Fixed(1.0, 2.0)), "ok": Part(Fixed(1.0, 0.0), 1.0, True, 1.0)}
    composed = ComposedScorer(parts, violation=-1e4)
    baseline = mean_baseline(composed.score([GROUP]))
    assert baseline == {"p": 1.5}
    config = ShapingConfig(baseline_samples=2, calibrated=True)
    (group,) = ShapedScorer(composed, config, baseline).score([GROUP])
    assert group.rewards == pytest.approx([1 / (1 + math.exp(0.5)), 0.0])
    assert group.components["raw"] == [1.0, -1e4]


def test_constraints_alone_are_no_reward():
    with pytest.raises(UserError, match="at least one part must not be a constraint"):
        ComposedScorer({"safe": Part(Fixed(1.0), is_constraint=True)})


def test_shaping_applies_in_order_and_keeps_the_raw_reward():
    config = ShapingConfig(
        baseline_samples=2,
        calibrated=True,
        highest=0.7,
        length_penalty=0.01,
        unfinished_penalty=1.0,
    )
    baseline = mean_baseline([scored(0.0, 2.0)])
    assert baseline == {"p": 1.0}
    (group,) = ShapedScorer(Fixed(1.0, 6.0), config, baseline).score([GROUP])
    assert group.rewards == pytest.approx([0.5 - 0.02, 0.7 - 0.1 - 1.0])
    assert group.components == {"raw": [1.0, 6.0]}
    with pytest.raises(UserError, match="prompt 'p' has no baseline reward"):
        ShapedScorer(Fixed(1.0, 6.0), config, {}).score([GROUP])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline_samples": -1}, "baseline_samples must be >= 0"),
        ({"calibrated": True}, "calibrated needs baseline_samples >= 1"),
        ({"lowest": 1.0, "highest": 1.0}, "lowest must be < highest, got 1.0 and 1.0"),
    ],
)
def test_bad_shaping(options, message):
    with pytest.raises(UserError, match=message):
        ShapingConfig(**options)


def test_a_gate_must_be_finite():
    parts = {"a": Part(Fixed(1.0, 2.0))}
    scorer = ComposedScorer(parts, "gated", gate=lambda prompt: [float("nan")])
    with pytest.raises(UserError, match=r"reward.composition.gate gave \[nan\] on prompt 'p'"):
        scorer.score([[completion("x"), completion("y")]])
