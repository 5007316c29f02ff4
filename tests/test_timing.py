"""Timing contestants against each other: who takes part, and how often."""

from __future__ import annotations

import time

import torch

from rlhf_fast.timing import Contestant, peak_extra_bytes, peak_is_known, time_all


def test_who_is_too_slow_is_named_and_left_out(capsys):
    compiled = []

    def compiles():
        time.sleep(0.0 if compiled else 0.1)
        compiled.append(1)

    contestants = [
        Contestant("fast", lambda: None),
        Contestant("slow", lambda: time.sleep(0.1)),
        Contestant("compiled", compiles),
    ]
    times = time_all(contestants, 4, 1.0, limit=0.05)
    assert set(times) == {"fast", "compiled"} and len(times["fast"]) == 4
    assert "without slow: one run takes" in capsys.readouterr().out


def test_slow_ones_run_less_often():
    contestants = [Contestant("fast", lambda: None), Contestant("slow", lambda: time.sleep(0.03))]
    times = time_all(contestants, 4, 1.0, limit=0.05)
    assert len(times["fast"]) == 4 and len(times["slow"]) == 2


def test_peak_of_memory_that_is_freed_before_the_end():
    def run():
        for megabytes in (16, 64, 32):
            torch.ones(megabytes << 18).sum()

    if peak_is_known() and not torch.cuda.is_available():
        assert 48 << 20 < peak_extra_bytes(run) < 200 << 20
