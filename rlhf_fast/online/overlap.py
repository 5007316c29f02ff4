"""Sampling the next iteration while this one trains (asynchronous RLHF, arXiv 2410.18252)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.types import Group, group_from_json


class Ahead:
    """Runs `compute` in a thread while the block runs; its result is a stage on leaving it.

    The thread only reads the generator's own copy of the weights; the stage is written by the
    caller's thread, so the manifest has one writer, and its seconds are what the caller waited.
    Does nothing where `compute` is None or the stage is there already.
    """

    def __init__(
        self, run: RunFolder, iteration: int, compute: Callable[[], list[Group]] | None
    ) -> None:
        self.run = run
        self.name = f"iteration_{iteration}/completions"
        self.compute = compute
        self.future: Future[list[Group]] | None = None

    def __enter__(self) -> None:
        if self.compute and not (self.run.path / f"{self.name}.jsonl").exists():
            self.pool = ThreadPoolExecutor(1)
            self.future = self.pool.submit(self.compute)

    def __exit__(self, kind, error, traceback) -> None:
        if self.future:
            with self.pool:  # whose end waits for the thread
                if kind is None:
                    self.run.records(self.name, group_from_json, self.future.result)
