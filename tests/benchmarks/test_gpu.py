"""The command for a machine with a GPU: parts are independent and under a limit each."""

import subprocess
import sys

import pytest

from benchmarks import gpu, harness
from benchmarks.__main__ import options
from benchmarks.plan import GPU
from benchmarks.smallest import OPS, PROCESSES


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    return tmp_path


def script(text):
    return [sys.executable, "-c", text]


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(logs, monkeypatch, capsys):
    chosen = [
        gpu.Part("breaks", script("raise SystemExit('broken')"), 60),
        gpu.Part("hangs", script("import time; time.sleep(600)"), 1),
        gpu.Part("works", script("print('fine')"), 60),
    ]
    monkeypatch.setattr(gpu, "parts", lambda small: chosen)
    monkeypatch.setattr(sys, "argv", ["gpu", "--small"])
    with pytest.raises(SystemExit):
        gpu.main()
    shown = capsys.readouterr().out
    assert "failed (exit 1)" in shown and "stopped after 1 s" in shown and "1 of 3 parts" in shown
    assert "    broken\n" in shown, "the end of its output"
    assert (logs / "breaks.log").read_text() == "broken\n"
    assert (logs / "works.log").read_text() == "fine\n"


def test_what_is_done_is_not_done_again(logs, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "parts", lambda small: [gpu.Part("works", script(""), 60)])
    monkeypatch.setattr(gpu, "architecture", lambda: {"RLHF_FAST_CUDA_ARCHS": "90-real"})
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    gpu.main()
    assert "done before" in capsys.readouterr().out


def test_every_benchmark_is_a_part():
    names = {part.name for part in gpu.parts(small=False)}
    others = {"build", "limits", "tests", "growth", "workflow", "vllm"}
    assert names - {"model"} == {*OPS, *PROCESSES, *others}
    assert {part.name for part in gpu.parts(small=True)} == {*OPS, *PROCESSES, "tests"}


def test_training_takes_a_random_model_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    found = {part.name: part.command for part in gpu.parts(small=False)}
    assert found["model"][-1] == found["training"][-1] == str(gpu.RANDOM_MODEL)
    assert "-n" not in found["tests"]
    names = list(found)
    assert names.index("tests") < names.index("logps") < names.index("model"), "what is worth most"


def test_the_revision_may_be_told(monkeypatch):
    monkeypatch.setenv("RLHF_FAST_BENCHMARK_COMMIT", "abc1234")
    assert harness.commit() == "abc1234"
    monkeypatch.delenv("RLHF_FAST_BENCHMARK_COMMIT")
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert harness.commit() == "unknown"


def test_the_commands_of_the_parts_are_understood():
    """None of them can be run here: their arguments are read."""
    found = {part.name: part.command for part in gpu.parts(small=False)}
    for name, command in found.items():
        if "benchmarks" in command:
            args = options(command[command.index("benchmarks") + 1 :])
            assert args.save and (args.stems == [name] or name == "growth")
    done = subprocess.run([*found["workflow"], "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--trace PATTERN" in done.stdout


def test_all_of_it_fits_the_time_that_is_given():
    minutes = sum(plan.minutes for plan in GPU.values())
    assert minutes < 18, "the build, the tests and the workflow need the rest of 25"
