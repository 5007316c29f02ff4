"""Which data an iteration trains on: overlap with the previous update, accumulation."""

import json
import time
from dataclasses import replace
from pathlib import Path

from rlhf_fast.online.overlap import Ahead
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.workflow import run_online
from tests.online.helpers import kill_and_resume, rows_of, rows_without_times
from tests.records import completion


def tokens(path: Path) -> list:
    return [[c["token_ids"] for c in group["completions"]] for group in rows_of(path)]


def test_overlap_samples_from_one_update_earlier(config, tmp_path):
    run_online(replace(config, num_iterations=3, overlap=True))
    run = tmp_path / "run"
    rows = rows_without_times(run)
    assert [row.get("staleness") for row in rows] == [None, 0, 1, 1]
    # The same seeds in both runs: only the weights that iteration 2 is sampled from differ.
    plain = replace(config, output_dir=str(tmp_path / "plain"), num_iterations=3)
    run_online(plain)
    ours, theirs = (tokens(p / "iteration_1/completions.jsonl") for p in (run, tmp_path / "plain"))
    assert ours == theirs
    ours, theirs = (tokens(p / "iteration_2/completions.jsonl") for p in (run, tmp_path / "plain"))
    assert ours != theirs
    assert [row.get("staleness") for row in rows_without_times(tmp_path / "plain")][1:] == [0] * 3


def test_overlap_continues_to_the_same_metrics(config, tmp_path):
    config = replace(config, num_iterations=3, overlap=True, keep_checkpoints=1)
    run_online(replace(config, output_dir=str(tmp_path / "whole")))
    expected = rows_without_times(tmp_path / "whole")
    for stage in ("iteration_1/policy", "iteration_2/completions", "iteration_2/evaluation"):
        killed = replace(config, output_dir=str(tmp_path / stage.replace("/", "_")))
        assert kill_and_resume(killed, stage, "end") == expected


def test_waiting_for_the_samples_counts_as_their_time(config):
    run = RunFolder.create(config)

    def slow():
        time.sleep(0.4)
        return [[completion("w20")]]

    with Ahead(run, 2, slow):
        time.sleep(0.1)
    assert 0.2 < run.seconds("iteration_2/completions") < 0.4


def test_accumulated_data_grow(config, tmp_path):
    data = replace(config.data, accumulate=True)
    run_online(replace(config, data=data))
    run = tmp_path / "run"
    own = [len(rows_of(run / f"iteration_{k}/pairs.jsonl")) for k in (1, 2)]
    assert [row["num_pairs"] for row in rows_without_times(run)[1:]] == [own[0], sum(own)]


def test_a_failing_generator_ends_the_run_with_its_error(config, tmp_path):
    """The error of the thread that samples ahead is the run's error, and nothing is lost."""
    import pytest

    from rlhf_fast.errors import UserError
    from rlhf_fast.generation.hf import HFGenerator

    calls = []

    def generate(self, prompts, *arguments, original=HFGenerator.generate, **options):
        calls.append(len(prompts))
        if len(calls) == 3:  # after the evaluation and iteration 1: sampling ahead
            raise UserError("the engine died")
        return original(self, prompts, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFGenerator, "generate", generate)
        with pytest.raises(UserError, match="the engine died"):
            run_online(replace(config, overlap=True))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "iteration_1/policy" in [stage["name"] for stage in manifest["stages"]]
