"""A run in a process of its own that is killed a moment after a stage has begun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console

from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.workflow import resume, run_online

# A server that has everything imported and forks: a process takes milliseconds to start.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class KillSoon(Progress):
    """SIGKILL, which nothing can catch, `delay` seconds after the stage's start."""

    def __init__(self, stage: str | None, delay: float) -> None:
        super().__init__(Console(quiet=True))
        self.stage = stage
        self.delay = delay

    def announce(self, stage: str, seconds: float | None) -> None:
        if stage == self.stage and seconds is None:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _work(config: OnlineConfig, stage: str | None, delay: float) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    progress = KillSoon(stage, delay)
    if (Path(config.output_dir) / "config.yaml").exists():
        resume(Path(config.output_dir), progress)
    else:
        run_online(config, progress)


def run_and_kill(config: OnlineConfig, stage: str | None = None, delay: float = 0.0) -> bool:
    """Starts or continues the run; whether it was killed."""
    process = CONTEXT.Process(target=_work, args=(config, stage, delay))
    process.start()
    process.join(170)
    assert process.exitcode in (0, -signal.SIGKILL), f"{stage}: exit {process.exitcode}"
    return process.exitcode != 0
