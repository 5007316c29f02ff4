"""Votes of reward models on preference pairs: the corrections by hand, in the run, and alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_fast.cli import main
from rlhf_fast.data import TextPair
from rlhf_fast.errors import UserError
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.reward_voting import VoteConfig, all_corrected, corrected, differences
from rlhf_fast.online.workflow import run_online
from rlhf_fast.rewards import FunctionScorer
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.reward_config import RewardTrainingConfig
from rlhf_fast.types import Prompt
from tests.online.helpers import rows_of, write_rows
from tests.tiny import tiny_reward_model, tiny_tokenizer

PAIR = TextPair(Prompt("p", []), "good", "bad", margin=3.0, finished=(True, False))


def vote(*corrections, **options):
    return VoteConfig(corrections, members=2, **options)


def test_a_pair_that_is_seen_the_other_way_round_is_turned():
    turned = corrected(PAIR, [-3.0, 1.0], vote("flip"))
    assert (turned.chosen, turned.rejected, turned.finished) == ("bad", "good", (False, True))
    assert turned.margin == 0.0 and turned.target == 1.0
    assert corrected(PAIR, [3.0, -1.0], vote("flip")) == PAIR
    # The mean is -1, half a standard deviation below 0.
    assert corrected(PAIR, [-3.0, 1.0], vote("flip", flip_deviations=0.6)) == PAIR
    assert corrected(PAIR, [-3.0, 1.0], vote("flip", flip_deviations=0.4)).chosen == "bad"


def test_margins_and_soft_labels():
    assert corrected(PAIR, [-3.0, 1.0], vote("margin")).margin == -1.0
    assert corrected(PAIR, [-3.0, 1.0], vote("flip", "margin")).margin == 1.0
    soft = corrected(PAIR, [math.log(3), 0.0], vote("soft"))
    assert soft.target == pytest.approx((0.75 + 0.5) / 2) and soft.margin == 3.0
    turned = corrected(PAIR, [-math.log(3), 0.0], vote("flip", "soft"))
    assert turned.target == pytest.approx((0.75 + 0.5) / 2) and turned.chosen == "bad"


def test_differences_are_of_every_model_and_pair():
    pairs = [PAIR, replace(PAIR, chosen="a", rejected="bcd")]
    longer = FunctionScorer(lambda completions, **_: [float(len(text)) for text in completions])
    shorter = FunctionScorer(lambda completions, **_: [-float(len(text)) for text in completions])
    opinions = differences(iter([longer, shorter]), pairs)
    assert opinions == [[1.0, -2.0], [-1.0, 2.0]]
    assert [p.margin for p in all_corrected(pairs, opinions, vote("margin"))] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrections": ("flip",)}, "corrections go with either models or members"),
        ({"members": 2}, "corrections go with either"),
        ({"corrections": ("flip",), "members": 2, "models": ("M",)}, "corrections go with either"),
        ({"corrections": ("flip",), "members": 2, "flip_deviations": -1.0}, "must be >= 0"),
    ],
)
def test_bad_votes(options, message):
    with pytest.raises(UserError, match=message):
        VoteConfig(**options)


def wrong_pairs(path: Path) -> str:
    """Three in four prefer w50 to w60; the others are labelled the other way round."""
    better = {"chosen": "w50", "rejected": "w60"}
    worse = {"chosen": "w60", "rejected": "w50"}
    rows = [{"prompt": f"w{100 + i}"} | (better if i % 4 else worse) for i in range(40)]
    return write_rows(path, rows)


class Notes(Progress):
    """Keeps what the run says."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_run_corrects_wrong_labels(config, tmp_path):
    """Ten of forty labels are wrong; the vote turns nearly all of them and few others."""
    reward = RewardConfig(
        pairs=wrong_pairs(tmp_path / "pairs.jsonl"),
        training=RewardTrainingConfig(parameters="head", holdout_share=0.0),
        vote=VoteConfig(("flip",), members=2),
    )
    progress = Notes()
    run_online(replace(config, num_iterations=1, reward=reward), progress)
    (turned,) = (note for note in progress.notes if note.startswith("the vote of 2 reward models"))
    assert 8 <= int(turned.split()[-4]) <= 12 and turned.endswith("of 40 pairs")
    folder = tmp_path / "run" / "reward_model"
    assert rows_of(folder / "metrics.jsonl")[0]["accuracy"] > 0.9
    assert {p.name for p in folder.iterdir()} == {
        *("model", "voter_1", "voter_2"),
        *("metrics.jsonl", "metrics_voter_1.jsonl", "metrics_voter_2.jsonl"),
    }


def test_the_stage_takes_ready_models(model_path, tmp_path, capsys):
    save_model(tmp_path / "voter", tiny_reward_model(), tiny_tokenizer())
    command = ["reward", "--model", model_path, "--pairs", wrong_pairs(tmp_path / "pairs.jsonl")]
    command += ["--training.parameters", "head", "--vote.corrections", "soft"]
    command += ["--device", "cpu", "--precision", "fp32"]
    voted = [*command, "--vote.models", str(tmp_path / "voter"), "--output", str(tmp_path / "rm")]
    assert main(voted) == 0
    assert main([*command, "--vote.members", "2", "--output", str(tmp_path / "other")]) == 1
    assert "train them with --member" in capsys.readouterr().err


def test_votes_are_of_pairs(config):
    training = RewardTrainingConfig("pairwise", optimizer=OptimizerConfig())
    reward = RewardConfig(labeller="helpers:varied", training=training, vote=vote("flip"))
    with pytest.raises(UserError, match="objective pairs or segments, got pairwise"):
        replace(config, reward=reward).check_complete()
