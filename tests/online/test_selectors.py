"""Every selection rule on hand-made rewards; random rules by their distribution."""

from collections import Counter
from dataclasses import replace

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.online.selectors import GROUP_RULES, PAIR_RULES, SelectionConfig, select
from tests.records import scored


def rewards_of(items, **options):
    selected = select(items, SelectionConfig(**options), seed=0)
    if options.get("rule", "best_vs_worst") in PAIR_RULES:
        return [(p.chosen_reward, p.rejected_reward) for p in selected]
    return [g.rewards for g in selected]


def test_best_vs_worst_prefers_the_earlier_among_equals():
    group = scored(0.5, 2.0, -1.0, 2.0, -1.0)
    (pair,) = select([group], SelectionConfig(), seed=0)
    assert (pair.chosen, pair.rejected) == (group.completions[1], group.completions[4])
    assert (pair.chosen_reward, pair.rejected_reward) == (2.0, -1.0)


def test_second_best_meets_second_worst():
    group = scored(0.5, 2.0, -1.0, 1.0, 0.5)
    pairs = select([group], SelectionConfig(pairs_per_prompt=2), seed=0)
    assert [(p.chosen_reward, p.rejected_reward) for p in pairs] == [(2.0, -1.0), (1.0, 0.5)]
    assert pairs[1].rejected is group.completions[4]


@pytest.mark.parametrize("rule", sorted(PAIR_RULES))
def test_equal_rewards_give_no_pair_unless_ties_are_kept(rule):
    assert rewards_of([scored(1, 1, 1)], rule=rule) == []
    assert rewards_of([scored(1, 1, 1)], rule=rule, keep_ties=True) == [(1.0, 1.0)]


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_second", "widest_gaps"])
def test_the_gap_must_exceed_the_minimum(rule):
    assert rewards_of([scored(0, 1)], rule=rule, min_gap=1.0) == []
    assert rewards_of([scored(0, 1)], rule=rule, min_gap=0.99) == [(1.0, 0.0)]


def test_best_vs_second():
    assert rewards_of([scored(3, 9, 5), scored(1, 2, 2)], rule="best_vs_second") == [(9.0, 5.0)]


def test_widest_gaps():
    options = {"rule": "widest_gaps", "min_gap": 0.5}
    assert rewards_of([scored(0.0, 0.4, 2.0)], pairs_per_prompt=9, **options) == [
        (2.0, 0.0),
        (2.0, 0.4),
    ]
    assert rewards_of([scored(0.0, 0.4, 2.0)], pairs_per_prompt=1, **options) == [(2.0, 0.0)]


def test_best_vs_random_is_uniform_over_the_others():
    groups = [scored(0, 1, 2, 3, prompt_id=str(i)) for i in range(3000)]
    pairs = rewards_of(groups, rule="best_vs_random")
    assert {chosen for chosen, _ in pairs} == {3.0}
    counts = Counter(rejected for _, rejected in pairs)
    assert set(counts) == {0.0, 1.0, 2.0}
    assert all(abs(n - 1000) < 4 * (1000 * 2 / 3) ** 0.5 for n in counts.values())


def test_best_vs_random_takes_different_rivals():
    pairs = rewards_of([scored(0, 1, 2, 3)], rule="best_vs_random", pairs_per_prompt=3)
    assert sorted(pairs) == [(3.0, 0.0), (3.0, 1.0), (3.0, 2.0)]


def test_random_pair_is_uniform_over_pairs():
    groups = [scored(0, 1, 2, prompt_id=str(i)) for i in range(3000)]
    counts = Counter(rewards_of(groups, rule="random_pair"))
    assert set(counts) == {(1.0, 0.0), (2.0, 0.0), (2.0, 1.0)}
    assert all(abs(n - 1000) < 4 * (1000 * 2 / 3) ** 0.5 for n in counts.values())


def test_a_draw_depends_on_seed_and_prompt_alone():
    config = SelectionConfig("best_vs_random")
    groups = [scored(*range(6), prompt_id=str(i)) for i in range(30)]
    whole = select(groups, config, seed=1)
    assert whole == select(groups, config, seed=1) != select(groups, config, seed=2)
    assert select(groups[7:8], config, seed=1) == whole[7:8]


def test_top_is_a_ranked_list():
    groups = [scored(1, 3, 2), scored(0, 0, 5)]
    assert rewards_of(groups, rule="top") == [[3.0], [5.0]]
    assert rewards_of(groups, rule="top", responses_per_prompt=3) == [[3, 2, 1], [5, 0, 0]]


def test_batch_top_ranks_all_prompts_together():
    groups = [scored(1, 3, 2), scored(0, 0, 0.5), scored(9, 8, 7)]
    assert rewards_of(groups, rule="batch_top") == [[9.0, 8.0, 7.0]]
    assert rewards_of(groups, rule="batch_top", responses_per_prompt=2) == [[3, 2, 1], [9, 8, 7]]


def test_threshold_keeps_the_order_and_leaves_out_empty_groups():
    groups = [scored(1, 0, 1), scored(0, 0, 0)]
    assert rewards_of(groups, rule="threshold", min_reward=1.0) == [[1.0, 1.0]]


def test_best_worst_and_best_random():
    assert rewards_of([scored(1, 3, 2, 0)], rule="best_worst") == [[3.0, 0.0]]
    groups = [scored(1, 3, 2, 0, prompt_id=str(i)) for i in range(1500)]
    kept = rewards_of(groups, rule="best_random")
    assert {best for best, _ in kept} == {3.0}
    counts = Counter(other for _, other in kept)
    assert set(counts) == {0.0, 1.0, 2.0} and min(counts.values()) > 420


def test_resample_follows_the_powers_of_the_rewards():
    groups = [scored(-1, 2, 0, prompt_id=str(i)) for i in range(2000)]
    kept = rewards_of(groups, rule="resample", power=2.0)
    assert all(len(rewards) == 3 for rewards in kept)
    counts = Counter(r for rewards in kept for r in rewards)
    assert set(counts) == {-1.0, 2.0}
    assert abs(counts[-1.0] / 6000 - 0.2) < 4 * (0.16 / 6000) ** 0.5
    assert rewards_of([scored(0, 0)], rule="resample") == []


def test_groups_of_equal_rewards_are_dropped_on_demand():
    groups = [scored(1, 1), scored(1, 2)]
    assert rewards_of(groups, rule="all") == [[1, 1], [1, 2]]
    assert rewards_of(groups, rule="all", drop_equal_groups=True) == [[1, 2]]


@pytest.mark.parametrize("rule", [*PAIR_RULES, *GROUP_RULES])
def test_completions_and_rewards_stay_together(rule):
    group = scored(4, 1, 3, 2)
    reward_of = {c.text: r for c, r in zip(group.completions, group.rewards)}
    for item in select([group], SelectionConfig(rule), seed=3):
        if rule in PAIR_RULES:
            pairs = [(item.chosen, item.chosen_reward), (item.rejected, item.rejected_reward)]
        else:
            pairs = zip(item.completions, item.rewards)
        assert all(reward_of[c.text] == r for c, r in pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs_per_prompt": 0}, "pairs_per_prompt must be >= 1, got 0"),
        ({"min_gap": -1.0}, "min_gap must be >= 0"),
        ({"min_gap": 1.0, "keep_ties": True}, "0 with keep_ties, got 1.0"),
        ({"power": -1.0}, "power must be >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SelectionConfig(**options)


@pytest.mark.parametrize("rule", [*PAIR_RULES, "best_worst", "best_random"])
def test_one_response_cannot_be_compared(rule):
    with pytest.raises(UserError, match="compares responses, got 1 to prompt 'p'"):
        select([scored(1, 2, prompt_id="q"), scored(1)], SelectionConfig(rule), seed=0)
    assert select([], SelectionConfig(rule), seed=0) == []


@pytest.mark.parametrize("rule", ["best_vs_worst", "widest_gaps", "random_pair"])
def test_equal_responses_make_no_pair_whatever_their_rewards(rule):
    """As a drawn judge, or a reward model's rounding, may give them."""
    config = SelectionConfig(rule, pairs_per_prompt=1)
    assert select([scored(1, 2, texts=["same", "same"])], config, seed=0) == []
    assert len(select([scored(1, 2, texts=["same", "other"])], config, seed=0)) == 1


def from_sources(rewards, sources):
    group = scored(*rewards)
    completions = [replace(c, source=s) for c, s in zip(group.completions, sources)]
    return replace(group, completions=completions)


def test_the_policy_meets_the_reference_in_order():
    group = from_sources([1, 5, 3, 2], ["policy", "policy", "reference", "reference"])
    options = {"rule": "policy_vs_reference", "pairs_per_prompt": 2}
    pairs = select([group], SelectionConfig(**options), seed=0)
    assert [(p.chosen_reward, p.rejected_reward) for p in pairs] == [(3, 1), (5, 2)]
    assert [(p.chosen.source, p.rejected.source) for p in pairs] == [
        ("reference", "policy"),
        ("policy", "reference"),
    ]
    assert len(select([group], SelectionConfig("policy_vs_reference"), seed=0)) == 1
    tie = from_sources([1, 1], ["policy", "reference"])
    assert select([tie], SelectionConfig(**options), seed=0) == []
    assert len(select([tie], SelectionConfig(**options, keep_ties=True), seed=0)) == 1


def test_the_rows_response_is_chosen_whatever_the_rewards():
    group = from_sources([4, 5, 3], ["policy", "policy", "data"])
    (pair,) = select([group], SelectionConfig("data_vs_policy"), seed=0)
    assert (pair.chosen_reward, pair.rejected_reward) == (3, 4)
    config = SelectionConfig("data_vs_policy", pairs_per_prompt=3)
    pairs = select([group], config, seed=0)
    assert [(p.chosen.source, p.rejected_reward) for p in pairs] == [("data", 4), ("data", 5)]
    assert config.min_generations == 3
    with pytest.raises(UserError, match="min_gap: rule data_vs_policy makes no use of it"):
        SelectionConfig("data_vs_policy", min_gap=0.5)


def test_only_own_samples():
    group = from_sources([1, 5, 3], ["policy", "mixture", "greedy"])
    other = from_sources([9], ["reference"])
    (kept,) = select([group, other], SelectionConfig("all", own_samples_only=True), seed=0)
    assert kept.rewards == [1, 3]
