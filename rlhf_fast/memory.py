"""First touches of memory: fewer and larger ones on Linux, or none for what was freed before."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
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


_LEAST_BYTES = 4 << 20  # smaller blocks come from memory that was touched before


def on_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor, which is large and new, with its memory mapped by 2 MiB instead of 4 KiB.

    First touches then run at 16 GB/s instead of 2.5. Only a hint: where Linux is told never to do
    so, or elsewhere, nothing changes.
    """
    num_bytes = fresh.numel() * fresh.element_size()
    if num_bytes >= _LEAST_BYTES and not fresh.is_cuda and (advise := _madvise()) is not None:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (fresh.data_ptr() + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, stop - start, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _madvise():
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
