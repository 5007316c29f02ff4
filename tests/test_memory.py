"""Fresh memory on huge pages: the values of a tensor do not know, and the system is asked."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast.memory import on_huge_pages


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_large_tensors_ask_for_huge_pages():
    num_bytes = 64 << 20
    fresh = torch.empty(num_bytes, dtype=torch.uint8)
    assert on_huge_pages(fresh) is fresh
    assert "hg" in flags_at(fresh.data_ptr() + num_bytes // 2)
    assert fresh.fill_(3).float().mean() == 3


def test_small_tensors_do_not(monkeypatch):
    monkeypatch.setattr("rlhf_fast.memory._madvise", lambda: pytest.fail("asked"))
    assert on_huge_pages(torch.empty(1 << 18)).numel() == 1 << 18


def test_empty_tensors_are_left_alone():
    assert on_huge_pages(torch.empty(0)).numel() == 0


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))
