"""Keeps glibc from returning freed memory to the system at once."""

from __future__ import annotations

import ctypes
import sys

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
