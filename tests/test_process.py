"""Idle threads sleep soon, settled before torch loads; signals end a command in order."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from rlhf_fast.process import bound_spinning, stopped_as_by_ctrl_c


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_the_users_choice_stands(before, after):
    bound_spinning(before)
    assert before == after


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("rlhf_fast.cli.main", ["sft", "--help"]), ("rlhf_fast.training.__main__", ["sft", "--help"])],
)
def test_it_comes_before_torch(module, arguments):
    code = f"""
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch loads with", os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
from {module} import main
main({arguments})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch loads with" in done.stdout
    assert "torch loads with None" not in done.stdout, done.stdout


@pytest.fixture
def handlers():
    """As in a process of its own: whoever runs the tests may ignore SIGHUP."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_block_alone(handlers, number):
    with pytest.raises(KeyboardInterrupt), stopped_as_by_ctrl_c():
        os.kill(os.getpid(), number)
        signal.pause()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored(handlers):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopped_as_by_ctrl_c():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_threads_set_no_handler(handlers):
    def work():
        with stopped_as_by_ctrl_c():
            done.append(signal.getsignal(signal.SIGTERM))

    done: list = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]
