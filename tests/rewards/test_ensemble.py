"""Ensembles: each reduction by hand, and which response they prefer."""

import tempfile

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.gating import Gate
from rlhf_fast.rewards import HeadsScorer, RewardModelScorer
from rlhf_fast.rewards.ensemble import REDUCTIONS, EnsembleScorer
from rlhf_fast.rewards.segments import SegmentScorer
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


def reward_model(num_outputs):
    from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
    from tests.tiny import tiny_model, tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        model = fresh_reward_model(folder, num_outputs=num_outputs)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    return RewardModel(model, tiny_tokenizer(), precision="fp32")


def test_heads_of_one_model_are_an_ensemble():
    model = reward_model(3)
    groups = [[completion("w21 w22"), completion("w23")], [completion("w24 w25 w26")]]
    mean = HeadsScorer(model, "mean").score(groups)
    plain = RewardModelScorer(model).score(groups)
    for ours, theirs in zip(mean, plain):  # equal weights: the model's own reward
        assert ours.rewards == pytest.approx(theirs.rewards, rel=1e-4, abs=1e-5)
    for group in HeadsScorer(model, "min").score(groups):
        opinions = list(zip(*group.components.values()))
        assert group.rewards == [min(o) for o in opinions] and len(opinions[0]) == 3


def test_one_head_is_no_ensemble():
    with pytest.raises(UserError, match="needs several opinions"):
        HeadsScorer(reward_model(1), "lcb")


def test_the_gate_of_a_model_is_not_passed_over():
    model = reward_model(3)
    model.gate = Gate(32, 3, width=8)
    for of_outputs in (lambda: HeadsScorer(model, "min"), lambda: SegmentScorer(model, None)):
        with pytest.raises(UserError, match="takes a reward model's outputs without its gate"):
            of_outputs()
