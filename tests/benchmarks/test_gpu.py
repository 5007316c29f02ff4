"""The command for a machine with a GPU: parts are independent and under a limit each."""

import sys

import pytest

from benchmarks import gpu
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
    assert names >= {*OPS, *PROCESSES} and {"build", "tests"} < names
    assert {part.name for part in gpu.parts(small=True)} == {*OPS, *PROCESSES, "tests"}
