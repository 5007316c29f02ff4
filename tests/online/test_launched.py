"""The loop in two processes: the same numbers as in one, errors told once, refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import ToldElsewhere, UserError
from rlhf_fast.launch import Launch
from rlhf_fast.online.config import AdapterConfig, OnlineConfig, RewardConfig
from rlhf_fast.online.config_file import config_to_yaml, config_with
from rlhf_fast.online.workflow import _check_alone, resume
from rlhf_fast.recipes import METHODS
from tests.online.helpers import pair_rows, rows_of, rows_without_times, write_rows
from tests.training.launched import LAUNCHERS

ROOT = Path(__file__).parents[2]


def launch(launcher: str, config: OnlineConfig, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/online")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = ["-m", "rlhf_fast.cli", "online", "--config", str(tmp_path / "run.yaml")]
    line = [*LAUNCHERS[launcher], *command]
    return subprocess.run(line, capture_output=True, text=True, env=env, cwd=ROOT)


def by_one_process(run: Path, tmp_path: Path) -> Path:
    """The run from its sampled responses on, by this process alone."""
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    for name in ("scored.jsonl", "selected.jsonl", "pairs.jsonl", "training.jsonl"):
        (alone / "iteration_1" / name).unlink(missing_ok=True)
    for name in ("policy", "critic"):
        shutil.rmtree(alone / "iteration_1" / name, ignore_errors=True)
    (alone / "metrics.jsonl").unlink()
    resume(alone)
    return alone


def prepared(config: OnlineConfig, method: str, tmp_path: Path) -> OnlineConfig:
    """One iteration of a published method; rewards that tell most responses apart."""
    config = config_with(config, METHODS[method][1], method)
    rl = replace(config.rl, optimizer=config.dpo.optimizer)
    config = replace(config, num_iterations=1, reward=RewardConfig(function="helpers:varied"))
    if method == "ppo":
        return replace(config, rl=rl)
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    return replace(config, reward=RewardConfig(pairs=pairs), lora=AdapterConfig(rank=4))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_compute_what_one_does(launcher, config, tmp_path):
    method = "iterative-dpo" if launcher == "replicated" else "ppo"
    config = prepared(config, method, tmp_path)
    done = launch(launcher, config, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    run = Path(config.output_dir)
    alone = by_one_process(run, tmp_path)
    for name in ("scored.jsonl", "training.jsonl"):
        ours, theirs = (rows_of(folder / "iteration_1" / name) for folder in (run, alone))
        assert numbers_of(ours) == pytest.approx(numbers_of(theirs), rel=1e-3, abs=1e-5)
    ours, theirs = (rows_without_times(folder) for folder in (run, alone))
    assert numbers_of(ours) == pytest.approx(numbers_of(theirs), rel=1e-3, abs=1e-4)


def numbers_of(value) -> list[float]:
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers_of(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in numbers_of(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


def test_an_error_of_the_main_process_is_told_once_and_ends_all(config, tmp_path):
    config = replace(config, reward=RewardConfig(function="helpers:returns_nan"))
    done = launch("replicated", config, tmp_path)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("rlhf-fast online: ")]
    assert len(told) == 1 and "nan" in told[0]
    assert f"`rlhf-fast resume {config.output_dir}`" in told[0]


def test_what_one_process_alone_can_do_is_refused(config):
    pair = Launch()
    pair.num_processes = 2
    with pytest.raises(UserError, match="overlap samples in a thread"):
        _check_alone(replace(config, overlap=True), pair)
    _check_alone(config, pair)


class Talk(Launch):
    """The second of two processes; the first one's values are known."""

    def __init__(self, first) -> None:
        super().__init__()
        self.rank, self.num_processes, self.first = 1, 2, first

    def gather(self, value):
        return [self.first, value]


def test_the_others_raise_what_the_main_process_tells():
    def fails():
        raise AssertionError("computed by the main process alone")

    assert Talk((3, None)).on_main(fails) == 3
    with pytest.raises(ToldElsewhere, match="no such file"):
        Talk((None, "no such file")).on_main(fails)


def test_items_are_shared_out_in_turn():
    shared = Talk((["a", "c", "e"], None)).share("abcde", lambda mine: [x.upper() for x in mine])
    assert shared == ["a", "B", "c", "D", "e"]
    assert Talk((["a"], None)).share("a", lambda mine: 1 / 0) == ["a"]
    with pytest.raises(ToldElsewhere, match="too long"):
        Talk((None, "too long")).share("ab", list)


def test_one_of_the_processes_that_fail_tells_it():
    def fails(items):
        raise UserError("no memory")

    with pytest.raises(UserError, match="no memory") as raised:
        Talk((["a"], None)).share("ab", fails)
    assert raised.type is UserError
    with pytest.raises(ToldElsewhere, match="too long"):
        Talk((None, "too long")).share("ab", fails)
