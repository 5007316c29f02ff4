"""Ensembles: each reduction by hand, and which response they prefer."""

import pytest

from rlhf_fast.rewards.ensemble import REDUCTIONS, EnsembleScorer
from rlhf_fast.types import ScoredGroup
from tests.records import completion


class Fixed:
    """Gives the same rewards to every group."""

    def __init__(self, *rewards):
        self.rewards = list(rewards)

    def score(self, groups):
        return [ScoredGroup(g[0].prompt, list(g), self.rewards[: len(g)]) for g in groups]


@pytest.mark.parametrize(
    ("reduction", "coefficient", "expected"),
    [
        ("mean", 9.0, 2.0),
        ("min", 9.0, 1.0),
        ("uwo", 0.5, 2.0 - 0.5 * 2 / 3),
        ("lcb", 0.5, 2.0 - 0.5 * (2 / 3) ** 0.5),
        ("robust", 0.25, 0.75 * 2.0 + 0.25 * 1.0),
    ],
)
def test_reductions(reduction, coefficient, expected):
    assert REDUCTIONS[reduction]([1.0, 2.0, 3.0], coefficient) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_members_that_agree_are_believed(reduction):
    assert REDUCTIONS[reduction]([0.7, 0.7, 0.7], 1.0) == pytest.approx(0.7)


def test_caution_prefers_the_response_on_which_members_agree():
    group = [completion("disputed"), completion("agreed")]
    members = {"a": Fixed(5.0, 1.0), "b": Fixed(-1.0, 1.0)}
    for reduction, best in [("mean", 0), ("min", 1), ("uwo", 1), ("lcb", 1), ("robust", 1)]:
        (scored,) = EnsembleScorer(members, reduction).score([group])
        assert max((0, 1), key=scored.rewards.__getitem__) == best, reduction
        assert scored.components == {"a": [5.0, 1.0], "b": [-1.0, 1.0]}
        assert scored.completions == group
