"""Measures the machine's limits in the run that is compared with them.

The rates are those of memory: 256 MiB streamed, the best of several passes. Batches of losses are a
few MiB, which a cache may hold; in a contest the contestants before displace them, so memory is
the fair measure. It holds for steady streams: of some 100 us, a call's own start is a large part,
so policy and value losses are compared with a pass over the same arrays (`benchmarks.one_pass`).
"""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_fast.timing import Contestant, time_all


@dataclass(frozen=True)
class Floors:
    read_gb_s: float
    update_gb_s: float
    """Bytes read plus bytes written, in place."""
    exp_g_s: float

    def forward_ms(self, num_bytes: int, num_exp: int) -> float:
        """The larger of reading the input once and its exponentials."""
        return max(num_bytes / self.read_gb_s, num_exp / self.exp_g_s) / 1e6

    def read_and_write_ms(self, num_read: int, num_written: int, num_exp: int) -> float:
        """Reading some bytes and writing others, or the exponentials."""
        in_place = 2 * min(num_read, num_written)
        rest = num_read + num_written - in_place
        seconds = in_place / self.update_gb_s + rest / self.read_gb_s
        return max(seconds, num_exp / self.exp_g_s) / 1e6

    def update_ms(self, num_bytes: int, num_exp: int) -> float:
        """Reading and rewriting the input once, or its exponentials."""
        return self.read_and_write_ms(num_bytes, num_bytes, num_exp)


@functools.cache
def _library() -> ctypes.CDLL:
    path = Path(tempfile.mkdtemp()) / "floors.so"
    source = Path(__file__).with_name("floors.cpp")
    options = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-DRLHF_FAST_ISA=floors"]
    include = f"-I{source.parents[1] / 'csrc/include'}"
    subprocess.check_call(
        ["c++", *options, include, "-fPIC", "-shared", "-pthread", str(source), "-o", str(path)]
    )
    library = ctypes.CDLL(str(path))
    library.read_floats.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.update_floats.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.exponentials.argtypes = [ctypes.c_int64, ctypes.c_int]
    return library


def measure(threads: int, repeats: int = 7) -> Floors:
    if torch.cuda.is_available():
        return _measure_cuda(repeats)
    library, count = _library(), 1 << 26
    x = torch.zeros(count)

    def rate(function, amount: float) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return amount / min(seconds) / 1e9  # what the machine can do, not what it did on average

    return Floors(
        read_gb_s=rate(lambda: library.read_floats(x.data_ptr(), count, threads), 4 * count),
        update_gb_s=rate(lambda: library.update_floats(x.data_ptr(), count, threads), 8 * count),
        exp_g_s=rate(lambda: library.exponentials(count * 4, threads), count * 4),
    )


def _measure_cuda(repeats: int) -> Floors:
    """Bytes only: a GPU's exponentials are seldom what it waits for."""
    x = torch.zeros(1 << 29, device="cuda")  # 2 GiB, far more than the caches hold

    def rate(function, amount: float) -> float:
        times = time_all([Contestant("", function)], repeats, seconds=5.0)
        return amount / min(times[""]) / 1e6

    return Floors(
        read_gb_s=rate(lambda: x.sum(), 4 * x.numel()),
        update_gb_s=rate(lambda: x.add_(1.0), 8 * x.numel()),
        exp_g_s=math.inf,
    )


if __name__ == "__main__":
    print(measure(torch.get_num_threads()))
