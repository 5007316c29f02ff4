"""Evaluation figures by hand."""

import itertools
import statistics

import pytest

from rlhf_fast.online.metrics import (
    best_of_n,
    length_controlled_win_rate,
    pair_accuracy,
    win_rate,
)
from rlhf_fast.types import ScoredGroup
from tests.records import completion, scored


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = [3.0, -1.0, 4.0, 1.0]
    expected = [
        statistics.fmean(max(s) for s in itertools.combinations(rewards, n)) for n in (1, 2, 3, 4)
    ]
    assert best_of_n([scored(*rewards)]) == pytest.approx(expected)
    both = best_of_n([scored(*rewards), scored(0, 0, 0)])
    assert both == pytest.approx([e / 2 for e in expected[:3]])


def test_pair_accuracy_counts_ties_as_wrong():
    assert pair_accuracy([scored(1, 0), scored(0, 1), scored(1, 1), scored(2, 1)]) == 0.5


def sized(reward, num_tokens):
    c = completion("x", num_tokens=num_tokens)
    return ScoredGroup(c.prompt, [c], [float(reward)])


def test_a_win_rate_that_length_explains_is_controlled_away():
    """Longer always wins, and ours are longer mostly: at equal length nobody is better."""
    lengths = [(20, 10)] * 30 + [(10, 20)] * 10
    ours = [sized(a > b, a) for a, b in lengths]
    theirs = [sized(b > a, b) for a, b in lengths]
    assert win_rate(ours, theirs)[0] == 0.75
    assert length_controlled_win_rate(ours, theirs) == pytest.approx(0.5, abs=0.06)


def test_length_control_changes_nothing_where_length_says_nothing():
    ours = [sized(i % 4 > 0, 10 + i % 2) for i in range(400)]
    theirs = [sized(0.5, 10 + i // 2 % 2) for i in range(400)]
    plain = win_rate(ours, theirs)[0]
    assert plain == 0.75
    assert length_controlled_win_rate(ours, theirs) == pytest.approx(plain, abs=0.05)
