"""Fresh memory on huge pages: the values of a tensor do not know, and the system is asked."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast.memory import give_back, on_huge_pages


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_large_tensors_ask_for_huge_pages(monkeypatch):
    monkeypatch.setattr("rlhf_fast.memory._SLOW_CPU_SECONDS", math.inf)
    monkeypatch.setattr("rlhf_fast.memory._SLOW_SECONDS", math.inf)
    num_bytes = 64 << 20
    fresh = torch.empty(num_bytes, dtype=torch.uint8)
    assert on_huge_pages(fresh) is fresh
    assert "hg" in flags_at(fresh.data_ptr() + num_bytes // 2)
    assert fresh.fill_(3).float().mean() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_only_memory_of_the_tensor_is_touched():
    for offset in (0, 1, 4 << 20):
        whole = torch.full((24 << 20,), 7, dtype=torch.uint8)
        on_huge_pages(whole[offset : offset + (13 << 20)])
        assert (whole[:offset] == 7).all() and (whole[offset + (13 << 20) :] == 7).all()


@pytest.mark.parametrize("clock", ["thread_time", "perf_counter"])
def test_one_slow_piece_ends_it_whatever_the_size(clock, monkeypatch):
    advised, seconds = [], iter(range(100))
    monkeypatch.setattr("rlhf_fast.memory._madvise", lambda: lambda *args: advised.append(args))
    monkeypatch.setattr(f"rlhf_fast.memory.time.{clock}", lambda: next(seconds))
    on_huge_pages(torch.empty(64 << 20, dtype=torch.uint8))
    assert [length for _, length, _ in advised] == [4 << 20]


def test_small_tensors_do_not(monkeypatch):
    monkeypatch.setattr("rlhf_fast.memory._madvise", lambda: pytest.fail("asked"))
    assert on_huge_pages(torch.empty(1 << 18)).numel() == 1 << 18


def test_empty_tensors_are_left_alone():
    assert on_huge_pages(torch.empty(0)).numel() == 0


def test_memory_given_back_is_the_systems_and_nobody_elses():
    before, scratch, after = (torch.full((5000,), 7.0) for _ in range(3))
    give_back(scratch)
    assert (before == 7.0).all() and (after == 7.0).all()
    if sys.platform == "linux":
        assert (scratch == 0.0).sum() >= 5000 - 2 * 1024
    scratch.fill_(2.0)
    assert scratch.mean() == 2.0
    give_back(torch.empty(0))


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))
