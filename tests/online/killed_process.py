"""A run in a process of its own that is killed at one of the moments that leave a trace.

What a kill leaves is what is on disk, so moments are counted in accesses to the run's files, not in
seconds: the same number is the same moment on a machine of any speed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.stages.base import Stage
from rlhf_fast.online.workflow import resume, run_online

# A server that has everything imported and forks: a process takes milliseconds to start.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class Moments(Progress):
    """Counts the accesses to the run's files in each stage; SIGKILL at one of them.

    Just before it, or, where a file is opened for writing, just after it was emptied.
    """

    FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})

    def __init__(self, run: str, stage: str, moment: int) -> None:
        super().__init__(Console(quiet=True))
        self.run = os.path.abspath(run)
        self.kill_at = (stage, moment)
        self.stages: list[str] = []  # the open ones: a stage may need another
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._access)

    def announce(self, stage: str, seconds: float | None) -> None:
        if seconds is None:
            self.stages.append(stage)
        else:
            self.stages.remove(stage)

    def _access(self, event: str, args: tuple) -> None:
        if event not in self.FILE_EVENTS or not isinstance(args[0], str | os.PathLike):
            return
        if not os.path.abspath(args[0]).startswith(self.run):
            return
        stage = self.stages[-1] if self.stages else ""
        self.counts[stage] += 1
        if (stage, self.counts[stage]) == self.kill_at:
            self.kill_at = ("", 0)
            if event == "open" and str(args[1]).startswith("w"):
                open(args[0], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)  # nothing can catch it


def _work(config: OnlineConfig, stage: str, moment: int, answer) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    moments = Moments(config.output_dir, stage, moment)
    if (Path(config.output_dir) / "config.yaml").exists():
        resume(Path(config.output_dir), moments)
    else:
        run_online(config, moments)
    answer.put(dict(moments.counts))


def _work_stage(config: Stage, moment: int, answer) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    moments = Moments(config.output, "", moment)
    config.run()
    answer.put(moments.counts[""])


def stage_to_the_end(config: Stage) -> int:
    """Runs one stage by itself; how often it touched files whose names begin as its output's."""
    answer = CONTEXT.SimpleQueue()
    assert _exit_code(_work_stage, config, 0, answer) == 0
    return answer.get()


def kill_stage(config: Stage, moment: int) -> None:
    """Runs one stage by itself and kills it at the access `moment`, from 1."""
    code = _exit_code(_work_stage, config, moment, CONTEXT.SimpleQueue())
    assert code == -signal.SIGKILL, f"{config}, access {moment}: exit {code}, not killed"


def run_to_the_end(config: OnlineConfig) -> dict[str, int]:
    """Starts or continues the run; how often each stage touched the run's files."""
    answer = CONTEXT.SimpleQueue()
    assert _exit_code(_work, config, "", 0, answer) == 0
    return answer.get()


def run_and_kill(config: OnlineConfig, stage: str, moment: int) -> None:
    """Starts or continues the run and kills it at the access `moment`, from 1, in `stage`."""
    code = _exit_code(_work, config, stage, moment, CONTEXT.SimpleQueue())
    assert code == -signal.SIGKILL, f"{stage}, access {moment}: exit {code}, not killed"


def _exit_code(work: Callable, *args) -> int | None:
    process = CONTEXT.Process(target=work, args=args)
    process.start()
    process.join(170)
    return process.exitcode
