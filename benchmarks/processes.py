"""Commands that run one after the other under a limit each; none needs another to succeed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DONE = "done"


def run(
    command: list[str], limit_s: float, env: dict[str, str] | None = None, log: Path | None = None
) -> str:
    """How it ended: `DONE`, or why not. With `log` its output goes there."""
    output = log.open("w") if log else None
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        if process.poll() is None:  # too slow, or this process is being ended
            _end(process)
        if output:
            output.close()
    return DONE if code == 0 else f"failed (exit {code}){f', see {log}' if log else ''}"


def _end(process: subprocess.Popen) -> None:
    """First asks, so that it can end those that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue
