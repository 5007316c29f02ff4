"""Contestants of the training benchmark are processes that may end by themselves."""

import pytest

from benchmarks.bench_training import Contestant
from benchmarks.training_contestants import Settings


@pytest.mark.parametrize("is_seen_first", [False, True])
def test_a_contestant_that_was_killed_is_named(is_seen_first):
    settings = Settings("dpo", "none", "float32", "8/8", 1, 1, 1)
    contestant = Contestant("trl", settings, module="tests.benchmarks.killed_contestant")
    if is_seen_first:
        contestant.process.wait()
    with pytest.raises(SystemExit, match=r"trl ended without an answer \(exit -9; .*--pairs"):
        contestant.step()
