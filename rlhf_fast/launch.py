"""The processes of a launch by Accelerate or torchrun, of which this is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_fast.errors import ToldElsewhere, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")
Value = TypeVar("Value")

LONGEST_WAIT = timedelta(days=30)
"""For the main process, which may do hours of work that the others have no part in."""


def launched_with(name: str) -> bool:
    """Whether Accelerate's launcher was asked for it: "FSDP" or "DEEPSPEED"."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"


def several_processes() -> bool:
    """Whether this process is one of several of a launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process speaks to the user: it is the only one, or the first of a launch."""
    return os.environ.get("RANK", "0") == "0"


def start_accelerator(device: str, **options: Any) -> Accelerator:
    """Accelerate for models that every process loads whole; `device` "cpu" leaves GPUs alone."""
    import torch
    from accelerate import Accelerator

    # Or transformers would load models in the first process alone, as Accelerate's launcher asks.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    with _hidden("ACCELERATE_USE_DEEPSPEED"):  # or models would be loaded in shares
        return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), **options)


class Launch:
    """What the processes of a launch do together; all of them must call the same in turn.

    By itself, without an accelerator, this process is the main one and the only one.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.rank, self.num_processes = 0, 1
        if accelerator is not None and accelerator.num_processes > 1:
            import torch

            self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes
            # Of its own, as a GPU's collectives neither wait for hours nor run beside others.
            self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @classmethod
    def of_environment(cls, device: str) -> Launch:
        """The launch that started this process."""
        if not several_processes() and not launched_with("DEEPSPEED"):
            return cls()
        return cls(start_accelerator(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in order of rank."""
        if self.num_processes == 1:
            return [value]
        import torch

        found: list = [None] * self.num_processes
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def on_main(self, compute: Callable[[], Value]) -> Value:
        """What `compute()` gives in the main process; its UserError is raised in all."""
        if self.num_processes == 1:
            return compute()
        value, error = _outcome(compute) if self.is_main else (None, None)
        value, told = self.gather((value, error and str(error)))[0]
        if error:
            raise error
        if told:
            raise ToldElsewhere(told)
        return value

    def share(
        self, items: Sequence[Item], compute: Callable[[list[Item]], list[Value]]
    ) -> list[Value]:
        """One value for each item, in order; `compute` gives those of this process's share."""
        if self.num_processes == 1:
            return compute(list(items))
        mine = list(items[self.rank :: self.num_processes])
        values, error = _outcome(lambda: compute(mine)) if mine else ([], None)
        outcomes = self.gather((values, error and str(error)))
        failed = [rank for rank, (_, text) in enumerate(outcomes) if text]
        if failed:  # one of them tells the user
            raise (
                error if error and self.rank == failed[0] else ToldElsewhere(outcomes[failed[0]][1])
            )
        result: list = [None] * len(items)
        for rank, (found, _) in enumerate(outcomes):
            result[rank :: self.num_processes] = found
        return result


def _outcome(compute: Callable[[], Value]) -> tuple[Value | None, UserError | None]:
    try:
        return compute(), None
    except UserError as error:
        return None, error


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Without this environment variable."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
