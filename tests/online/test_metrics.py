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
    """The longer response wins nine times in ten, and ours is the longer one mostly."""
    meetings = [(20, 10, i > 2) for i in range(30)] + [(10, 20, i == 0) for i in range(10)]
    ours = [sized(wins, a) for a, b, wins in meetings]
    theirs = [sized(not wins, b) for a, b, wins in meetings]
    assert win_rate(ours, theirs)[0] == 0.7
    assert length_controlled_win_rate(ours, theirs) == pytest.approx(0.5, abs=0.01)


def test_length_control_changes_nothing_where_length_says_nothing():
    ours = [sized(i % 4 > 0, 10 + i % 2) for i in range(400)]
    theirs = [sized(0.5, 10 + i // 2 % 2) for i in range(400)]
    plain = win_rate(ours, theirs)[0]
    assert plain == 0.75
    assert length_controlled_win_rate(ours, theirs) == pytest.approx(plain, abs=0.05)
