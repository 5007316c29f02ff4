"""A GPU that is not there: tensors that were put on it are on the CPU, and say that they are not.

Under `pretended_gpu()` every storage has a device, as does every tensor that looks into it.
`tensor.device` and `tensor.is_cuda` tell it, results are where their inputs are, and an op over
tensors of several devices raises as on a real one. The package's own kernels are the emulated ones.
So code that leaves something on the CPU fails here; `syncs` counts where the host would wait.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_fast.ops import native

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten.set_.source_Storage}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""May have indices on the CPU."""
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
WAITS |= {aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default}
WAITS |= {aten.equal.default, aten.repeat_interleave.Tensor}


def _mm(a, b, out_dtype, *, out=None):
    assert a.dtype == b.dtype and out_dtype == torch.float32
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


def _addmm(total, a, b, out_dtype, *, out):
    assert a.dtype == b.dtype and out.dtype == total.dtype == out_dtype
    return torch.addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)


ONLY_ON_GPUS = {
    getattr(op, overload): twin
    for op, overload, twin in (
        (aten.mm, "dtype", _mm),
        (aten.mm, "dtype_out", _mm),
        (aten.addmm, "dtype_out", _addmm),
    )
    if overload in op.overloads()  # from torch 2.8 on
}
OWN = torch.Tensor.device.__get__


def device_of(tensor: Tensor) -> torch.device:
    own = OWN(tensor)
    if own.type != "cpu" or not torch._C._has_storage(tensor):
        return own
    return getattr(tensor.untyped_storage(), "pretended", CPU)


def put(value, device: torch.device):
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and device.type == "cuda" and torch._C._has_storage(tensor):
            tensor.untyped_storage().pretended = CUDA
    return value


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Devices(TorchDispatchMode):
    """Below autograd: what goes in must be on one device, and what comes out is there too."""

    def __init__(self) -> None:
        super().__init__()
        self.hint: torch.device | None = None  # for what an op makes without saying where
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(t, FakeTensor) for t in tensors):
            return function(*args, **kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU if torch.device(asked).type in ("cuda", "cpu") else asked
        if function in MOVES:
            return self._move(function, args, kwargs, asked)
        device = self._common(function, args, tensors)
        if device == CUDA and (function in WAITS or self._is_mask(function, args)):
            self.note()
        if not tensors or asked is not None:
            device = CUDA if _is_cuda(asked) else self._unsaid()
        if function.namespace == "rlhf_fast":  # its kernel's own calls are looked at too
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        return put(ONLY_ON_GPUS.get(function, function)(*args, **kwargs), device)

    def _move(self, function, args, kwargs, asked):
        source = next(x for x in reversed(args) if isinstance(x, Tensor))
        kwargs.pop("pin_memory", None)
        if function is aten._to_copy.default:
            # torch's own casts name the device that it sees.
            stays = asked is None or torch.device(asked) == CPU
            to = device_of(source) if stays else torch.device(asked)
        else:
            to = device_of(args[0])
        if device_of(source).type == "cuda" and to.type == "cpu":
            self.note()
        result = function(*args, **kwargs)
        return put(result, to) if function is aten._to_copy.default else result

    def _common(self, function, args, tensors) -> torch.device:
        devices = {device_of(t) for t in tensors if t.dim() or device_of(t) == CUDA}
        if function in INDEXED and CUDA in devices:
            indices = [t for t in args[1] if t is not None]
            if any(device_of(t) == CPU for t in indices):
                self.note()
            devices = {device_of(args[0])}
        if len(devices) > 1:
            found = [f"{tuple(t.shape)} on {device_of(t)}" for t in tensors]
            raise RuntimeError(f"{function}: tensors on several devices: {', '.join(found)}")
        return devices.pop() if devices else CPU

    @staticmethod
    def _is_mask(function, args) -> bool:
        return (
            function in INDEXED
            and any(t is not None and t.dtype == torch.bool and t.dim() for t in args[1])
            and not (function is not aten.index.Tensor and args[2].numel() == 1)
        )

    def _unsaid(self) -> torch.device:
        """Made inside torch, of a tensor's options; backward's formulas work on the GPU."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename.endswith(("_python_dispatch.py", "_ops.py")):
            frame = frame.f_back
        in_backward = frame.f_code.co_filename.endswith("autograd/graph.py")
        return CUDA if in_backward else self.hint or CPU

    def note(self) -> None:
        stack = [f for f in traceback.extract_stack() if "rlhf_fast/" in f.filename]
        last = stack[-1] if stack else traceback.extract_stack()[-4]
        self.syncs[f"{last.filename.rpartition('rlhf_fast/')[2]}:{last.lineno} {last.line}"] += 1


class _Hints(TorchFunctionMode):
    """Above it: what a call makes inside, of tensors on the GPU, is there too."""

    def __init__(self, devices: _Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("backward", "grad") and "autograd" in (function.__module__ or "autograd"):
            return self._backward(function, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before = self.devices.hint
        on_gpu = any(device_of(t) == CUDA for t in tensors) and kwargs.get("device") is None
        self.devices.hint = CUDA if on_gpu else None
        try:
            return function(*args, **kwargs)
        finally:
            self.devices.hint = before

    def _backward(self, function, args, kwargs):
        if function is Tensor.backward:
            with self:
                return torch.autograd.backward(*args, **kwargs)
        return function(*args, **kwargs)


def _move_to(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    there = device if device.type != "cpu" else torch.device("cpu", 0)  # asked for by name
    return aten._to_copy(tensor, dtype=dtype, device=there)


_real_to = Tensor.to


def _to(self, *args, **kwargs):
    args = [*args, *kwargs.values()]
    place = next((a for a in args if isinstance(a, str | torch.device | Tensor)), None)
    dtype = next((a for a in args if isinstance(a, torch.dtype)), None)
    if place is None:
        return _real_to(self, *args[:1]) if not kwargs else _real_to(self, **kwargs)
    if isinstance(place, Tensor):
        place, dtype = device_of(place), place.dtype
    device = torch.device(place)
    if device.type == device_of(self).type and device.type != "meta" and not kwargs.get("copy"):
        return self if dtype is None else _real_to(self, dtype)
    return _move_to(self, device, dtype)


def _host_only(real, devices: _Devices):
    def call(self, *args, **kwargs):
        if device_of(self) == CUDA:
            if real.__name__ == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            devices.note()
        return real(self, *args, **kwargs)

    return call


def _made(real):
    def make(data, *args, **kwargs):
        device = kwargs.pop("device", None)
        made = data if isinstance(data, Tensor) and real is not torch.tensor else None
        made = real(data, *args, **kwargs) if made is None or kwargs else made
        return made if device is None else _to(made, device)

    return make


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on = torch.device(device).type
        return made


class _Autocast(torch.autocast):
    """Of the GPU on what pretends to be there; that of the CPU changes nothing on a GPU."""

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        super().__init__("cpu", dtype, enabled and device_type == "cuda", cache_enabled)


def _patches(devices: _Devices, stack: contextlib.ExitStack) -> None:
    def patch(owner, name, value):
        stack.enter_context(mock.patch.object(owner, name, value, create=True))

    patch(Tensor, "device", property(device_of))
    patch(Tensor, "is_cuda", property(lambda self: device_of(self).type == "cuda"))
    patch(Tensor, "is_cpu", property(lambda self: device_of(self).type == "cpu"))
    patch(Tensor, "get_device", lambda self: -1 if device_of(self).type == "cpu" else 0)
    patch(Tensor, "to", _to)
    patch(Tensor, "cuda", lambda self, *args, **kwargs: _to(self, CUDA))
    patch(Tensor, "cpu", lambda self, *args, **kwargs: _to(self, CPU))
    patch(Tensor, "pin_memory", lambda self: self)
    for name in ("tolist", "numpy"):
        patch(Tensor, name, _host_only(getattr(Tensor, name), devices))
    patch(torch, "tensor", _made(torch.tensor))
    patch(torch, "as_tensor", _made(torch.as_tensor))
    patch(torch, "Generator", _Generator)
    patch(torch, "autocast", _Autocast)
    patch(torch, "is_autocast_enabled", lambda kind="cuda": _real_enabled("cpu"))
    patch(torch, "get_autocast_dtype", lambda kind: _real_dtype("cpu"))
    patch(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
    patch(torch._C, "_cuda_getDevice", lambda: 0)
    # A build of torch with CUDA would ask the driver about graph capture at every optimiser step.
    patch(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    patch(native, "_cuda_module", _emulated)
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "_lazy_init": None, "synchronize": None, "empty_cache": None, "manual_seed_all": None,
        "manual_seed": None, "is_current_stream_capturing": False, "memory_allocated": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "get_device_name": "GPU",
        "get_device_capability": (9, 0), "mem_get_info": (1 << 36, 1 << 37),
        "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
        "is_bf16_supported": True,
    }  # fmt: skip
    for name, answer in answers.items():
        patch(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)


_real_enabled = torch.is_autocast_enabled
_real_dtype = torch.get_autocast_dtype


def _emulated():
    from rlhf_fast import _emulated

    return _emulated


@contextlib.contextmanager
def pretended_gpu() -> Iterator[_Devices]:
    """Within, `cuda` is a device; the result counts the places where the host would wait for it."""
    devices = _Devices()
    with contextlib.ExitStack() as stack:
        _patches(devices, stack)
        stack.enter_context(devices)
        stack.enter_context(_Hints(devices))
        yield devices
