"""The bridge to the compiled modules: which one serves a tensor, and how it is handed over."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NoReturn, TypeVar

import torch

try:
    from rlhf_fast import _cpu
except ImportError as error:
    raise ImportError(
        "rlhf_fast: its compiled kernels must be importable, got "
        f"'{error}'; install the package with `pip install .` (needs a C++17 compiler)"
    ) from error

Function = TypeVar("Function", bound=Callable)
LIBRARY = torch.library.Library("rlhf_fast", "FRAGMENT")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The tables of csrc/include, whose order gives the numbers that the kernels take.
GROUP_ESTIMATORS: tuple[str, ...] = _cpu.GROUP_ESTIMATORS
POLICY_LOSSES: tuple[str, ...] = _cpu.POLICY_LOSSES
POLICY_RATIO_LEVELS: tuple[int, ...] = _cpu.POLICY_RATIO_LEVELS
POLICY_CHOICES: tuple[str, ...] = _cpu.POLICY_CHOICES
POLICY_SETTINGS: tuple[str, ...] = _cpu.POLICY_SETTINGS
POLICY_METRICS: tuple[str, ...] = _cpu.POLICY_METRICS
VALUE_METRICS: tuple[str, ...] = _cpu.VALUE_METRICS
NUM_VALUE_SUMS: int = _cpu.NUM_VALUE_SUMS

_emulated: ModuleType | None = None


def debug() -> bool:
    """Whether RLHF_FAST_DEBUG asks for checks that make the GPU wait."""
    return os.environ.get("RLHF_FAST_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """For tests: ops on CPU tensors run the CUDA kernels, emulated thread by thread on the CPU."""
    global _emulated
    from rlhf_fast import _emulated as module

    previous, _emulated = _emulated, module
    try:
        yield
    finally:
        _emulated = previous


def _cuda_module() -> ModuleType:
    try:
        from rlhf_fast import _cuda
    except ImportError as error:
        raise RuntimeError(
            "rlhf_fast: ops on CUDA tensors need the CUDA kernels, got a build without them "
            f"('{error}'); install again with nvcc on the PATH and RLHF_FAST_CUDA=ON"
        ) from error
    return _cuda


class _OnDevice:
    """A module on another GPU than the thread's current one; torch's guard goes back there only
    if that GPU is in use: else it would take memory on it."""

    def __init__(self, module: ModuleType, device: int):
        self._module, self._device = module, device

    def __getattr__(self, name: str):
        value = getattr(self._module, name)

        def call(*args):
            with torch.cuda.device(self._device):
                return value(*args)

        return call if callable(value) else value


def target(tensor: torch.Tensor) -> tuple[ModuleType | _OnDevice, int, int]:
    """The module for a tensor's device, then its place to run: (threads, 0) or (device, stream)."""
    if tensor.is_cuda:
        device, module = tensor.get_device(), _cuda_module()
        if device != torch._C._cuda_getDevice():
            module = _OnDevice(module, device)
        return module, device, torch._C._cuda_getCurrentRawStream(device)
    if _emulated is not None:
        return _emulated, 0, 0
    return _cpu, torch.get_num_threads(), 0


_tickets: dict[tuple[int, int], torch.Tensor] = {}


def ticket(tensor: torch.Tensor) -> torch.Tensor | None:
    """For kernels whose last block finishes for all: a count of blocks, 0 between launches.

    Launches on one stream come one after another and share it. A CUDA graph has its own, as it may
    be replayed on any stream.
    """
    if not tensor.is_cuda:
        return None if _emulated is None else torch.zeros((), dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=tensor.device)
    _, *place = target(tensor)
    if tuple(place) not in _tickets:
        _tickets[tuple(place)] = torch.zeros((), dtype=torch.int32, device=tensor.device)
    return _tickets[tuple(place)]


def scale_left(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """What gradients are still to be multiplied with: CUDA kernels count tokens last."""
    return scale if tensor.is_cuda or _emulated is not None else None


def implement(name: str, function) -> None:
    """Registers one function for CPU and CUDA tensors; `target` tells them apart."""
    LIBRARY.impl(name, function, "CPU")
    LIBRARY.impl(name, function, "CUDA")


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing but the tensor's device decides what an op does: no tracing, no subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


class Op:
    """An op of torch's library, called past the dispatcher where it would only cost time.

    For a batch of losses the dispatcher takes as long as the kernel. `function` allocates its
    outputs and calls the kernel; `fake` only allocates.
    """

    def __init__(self, schema: str, function: Callable, fake: Callable):
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        implement(name, function)
        torch.library.register_fake(f"rlhf_fast::{name}", lib=LIBRARY)(fake)
        self._function = function
        self._dispatched = getattr(torch.ops.rlhf_fast, name).default

    def __call__(self, first: torch.Tensor, *args):
        if is_plain(first):
            return self._function(first, *args)
        return self._dispatched(first, *args)


def remembered(function: Callable) -> Callable:
    """Checks of settings that are the same in every step, done once."""
    cached = functools.lru_cache(256)(function)

    @functools.wraps(function)
    def call(*args):
        # torch.compile traces through functions but not through caches
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    return call


def takes_tensors(function: Function) -> Function:
    """Has the op name the argument that ought to be a tensor and is none.

    It looks once a call has failed, so calls that pass pay for nothing.
    """
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (AttributeError, TypeError, ValueError):
            for name, value in (dict(zip(parameters, args)) | kwargs).items():
                if name in parameters:
                    _refuse_other(function.__name__, name, value, parameters[name].annotation)
            raise

    return call


def _refuse_other(op: str, name: str, value: object, annotation: str) -> None:
    """Raises if the annotation asks for a tensor and the value is something else."""
    for field, inner in getattr(value, "_asdict", dict)().items():  # PairData's tensors
        _refuse_other(op, f"{name}.{field}", inner, "Tensor | None")
    kinds = annotation.split(" | ")
    allowed = (torch.Tensor, float, int) if "float" in kinds else torch.Tensor
    given = isinstance(value, allowed) or (value is None and "None" in kinds)
    if "Tensor" in kinds and not given:
        numbers = " or a number" if "float" in kinds else ""
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise TypeError(
            f"{op}: {name} must be a tensor{numbers}, got {kind}; torch.as_tensor makes one of "
            f"arrays and lists"
        ) from None


def table(name: str) -> dict:
    """A table that the C++ side defines, for instance the losses by name."""
    return dict(getattr(_cpu, name))


def column(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, stride) of one float per item, at any distance."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_strides(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) of the rows of (..., V); None if two cannot say it."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    inner, inner_stride = merged[-1] if merged else (1, 0)
    return max(inner, 1), merged[0][1] if len(merged) == 2 else 0, inner_stride


def rows(tensor: torch.Tensor) -> tuple[int, int, int, int, int, int, int]:
    """A tensor (..., V) as the bindings take it; its layout has been checked before."""
    width = tensor.shape[-1]
    strides = row_strides(tensor)
    assert strides is not None
    num_rows = tensor.numel() // width
    return (tensor.data_ptr(), DTYPES[tensor.dtype], num_rows, width, *strides)


def refuse(op: str, must: str, got: object, advice: str) -> NoReturn:
    """Raises ValueError in the one form that all ops use."""
    raise ValueError(f"{op}: {must}, got {got}; {advice}")


def check(condition: bool, op: str, must: str, got: object, advice: str) -> None:
    """For settings. Where every call passes, `refuse` under an `if` spares building the words."""
    if not condition:
        refuse(op, must, got, advice)


def check_rows(op: str, name: str, tensor: torch.Tensor) -> None:
    """What every op asks of a tensor whose last dimension is the vocabulary."""
    got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
    check(
        tensor.dtype in DTYPES,
        op,
        f"{name} must be float32, float16 or bfloat16",
        got,
        "convert them first",
    )
    check(
        tensor.dim() >= 1 and tensor.shape[-1] >= 1,
        op,
        f"{name} must have shape (..., vocabulary) with at least one entry",
        got,
        "pass the logits as the model returns them",
    )
    check(
        (tensor.stride(-1) == 1 or tensor.shape[-1] == 1) and row_strides(tensor) is not None,
        op,
        f"{name} must be contiguous along the vocabulary and regular over the rows",
        got,
        f"pass {name}.contiguous(), which copies them",
    )
