"""Several benchmarks in one command: one that fails is named and does not stop the others."""

import math
import sys

import pytest

from benchmarks import bench_gae, harness, processes, report, suite
from benchmarks.__main__ import options
from benchmarks.plan import CPU, GPU, Plan
from benchmarks.smallest import OPS, PROCESSES

SMALLEST = ["--threads", "1", "--malloc", "default", "--seconds", "0.01"]
SIZES = ["--batch", "8", "--length", "16", "--only", "rlhf_fast", "eager"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return tmp_path


def chosen(*stems):
    return {stem: Plan(1, SMALLEST) for stem in stems}


def test_the_plan_has_every_benchmark_and_fits_an_hour():
    assert set(CPU) == set(GPU) == {*OPS, *PROCESSES}
    assert sum(plan.minutes for plan in CPU.values()) <= 60
    for table in (CPU, GPU):
        for stem, plan in table.items():
            assert options([stem, *plan.options]).stems == [stem]


def test_several_are_measured_saved_and_summed_up(kept, capfd):
    assert suite.run(chosen("gae", "whiten"), [*SIZES, "--save"], options, math.inf)
    shown = capfd.readouterr().out
    assert "2 of 2: whiten" in shown and "Of 2 contests" in shown
    rows = report.load(next((kept / "results").glob("*.csv")))
    assert {row["stem"] for row in rows} == {"gae", "whiten"}
    commands = {row["command"] for row in rows}
    assert f"python -m benchmarks gae {' '.join(SIZES)} --save" in commands


def test_what_this_revision_has_done_is_skipped_on_request(kept, capfd):
    for rest in (SIZES, [*SIZES, "--resume"]):
        assert suite.run(chosen("whiten"), rest, options, math.inf)
    assert capfd.readouterr().out.count("rlhf_fast") == 1
    assert suite.run(chosen("whiten", "gae"), [*SIZES, "--resume"], options, math.inf)
    shown = capfd.readouterr().out
    assert "done before" in shown and "gae, forward" in shown


def test_a_benchmark_that_fails_does_not_stop_the_next(kept, capfd):
    rest = [*SIZES[:-3], "--dtype", "no_such_dtype", "--tokens", "4", "--vocab", "8"]
    assert not suite.run(chosen("logps", "whiten"), rest, options, math.inf)
    shown = capfd.readouterr().out
    assert "not all well: logps: failed (exit 1)\n" in shown and "whiten, forward" in shown


def test_time_that_is_up_is_told(kept, capfd):
    assert not suite.run(chosen("gae", "whiten"), SIZES, options, 0.01)
    assert "gae: no time left; whiten: no time left" in capfd.readouterr().out


def test_a_contestant_that_fails_is_named_and_left_out(kept, monkeypatch, capsys):
    """One raises where it is checked, one answers wrongly, one breaks when it is timed."""
    calls = []

    def breaks_later(*inputs):
        calls.append(inputs)
        if len(calls) > 1:
            raise RuntimeError("worn out")
        return bench_gae.eager(*inputs)

    others = {
        "raises": lambda *inputs: 1 / 0,
        "wrong": lambda r, v, m: (r, r),
        "breaks later": breaks_later,
    }
    monkeypatch.setattr(bench_gae.peers, "gaes", lambda *settings: others)
    bench_gae.run(options(["gae", *SMALLEST, "--batch", "4", "--length", "8", "--save"]))
    names = [line.split(":")[0] for line in harness.failures(harness.RESULTS)]
    assert names == ["raises", "wrong", "breaks later"]
    assert "rlhf_fast" in capsys.readouterr().out
    rows = report.load(next(harness.RESULTS.glob("*.csv")))
    assert {row["contestant"] for row in rows} == {"rlhf_fast", "eager loop"}


def test_failures_of_contestants_end_in_an_error(kept, monkeypatch, capsys):
    monkeypatch.setattr(harness, "failures", lambda folder: ["Liger: TypeError: no"])
    assert not suite.run(chosen("whiten"), SIZES, options, math.inf)
    shown = capsys.readouterr().out
    assert "whiten, Liger: TypeError: no" in shown
    assert "not all well: whiten: done without Liger" in shown


def test_stems_come_first_and_are_known(capsys):
    with pytest.raises(SystemExit):
        options(["gae", "nothing"])
    assert "a stem must be one of" in capsys.readouterr().err


def test_a_process_ends_with_those_that_it_started(tmp_path):
    """A benchmark runs in a process of the command, which is a process of benchmarks.gpu."""
    inner = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w'); time.sleep(60)"
    outer = (
        "import signal, sys; from benchmarks import processes\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"processes.run([sys.executable, '-c', {inner!r}], 60)"
    )
    assert processes.run([sys.executable, "-c", outer], 0.7) == "stopped after 1 s"
    assert processes.run([sys.executable, "-c", "import time; time.sleep(2)"], 9) == processes.DONE
    assert not (tmp_path / "alive").exists()
