"""First touches of memory: fewer and larger ones on Linux, or none for what was freed before."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def reuse_freed_memory() -> bool:
    """Makes this process keep freed memory for its next allocations; False where not glibc.

    By default every tensor over 32 MiB is mapped afresh and its pages are zeroed on first touch,
    which costs several times the arithmetic of an element-wise operation on a CPU. The process
    then holds on to its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [
        mallopt(_M_MMAP_MAX, 0),
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1),
        mallopt(_M_TOP_PAD, 64 << 20),
    ]
    return all(done)


_HUGE_PAGE = 2 << 20
_PIECE = 2 * _HUGE_PAGE  # smaller blocks come from memory that was touched before
_SLOW_CPU_SECONDS, _SLOW_SECONDS = 1e-3, 50e-3


def on_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor, which is large and new, with its memory mapped by 2 MiB instead of 4 KiB.

    First touches then run at 16 GB/s instead of 2.5, so this makes them. Where huge pages are not
    at hand the system compacts memory to make one, or a virtual machine asks its host for 512
    small ones: the first piece that takes as long as small pages would ends it, and the rest is
    left to those. Where Linux is told never to do so, or elsewhere, nothing changes.
    """
    if _is_ours(fresh):
        start = _rounded_up(fresh.data_ptr(), _HUGE_PAGE)
        stop = (fresh.data_ptr() + _num_bytes(fresh)) // _HUGE_PAGE * _HUGE_PAGE
        for piece in range(start, stop - _PIECE + 1, _PIECE):
            _madvise()(piece, _PIECE, mmap.MADV_HUGEPAGE)
            cpu_seconds, seconds = time.thread_time(), time.perf_counter()
            for page in range(piece, piece + _PIECE, _HUGE_PAGE):
                ctypes.memset(page, 0, 1)
            # Waiting for another process's turn is not what makes a page slow.
            cpu_seconds, seconds = time.thread_time() - cpu_seconds, time.perf_counter() - seconds
            if cpu_seconds > _SLOW_CPU_SECONDS or seconds > _SLOW_SECONDS:
                break
    return fresh


def give_back(scratch: Tensor) -> None:
    """Returns memory to the system before the tensor is freed; its values are lost.

    glibc may keep what is freed, and put the next block elsewhere: both then count.
    """
    if _is_ours(scratch):
        start = _rounded_up(scratch.data_ptr(), mmap.PAGESIZE)
        length = scratch.data_ptr() + _num_bytes(scratch) - start
        if length >= mmap.PAGESIZE:
            _madvise()(start, length // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _is_ours(tensor: Tensor) -> bool:
    """Whether Linux can be advised on the memory of a contiguous tensor."""
    return sys.platform.startswith("linux") and not tensor.is_cuda


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rounded_up(address: int, size: int) -> int:
    return -(-address // size) * size


@functools.cache
def _madvise():
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
