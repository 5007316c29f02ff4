"""Contestants that would not fit into memory are left out by name; sizes are never cut."""

from __future__ import annotations

from benchmarks import harness
from benchmarks.bench_kl import kinds_at


def test_what_does_not_fit_is_named(monkeypatch, capsys):
    monkeypatch.setattr(harness, "_free_bytes", lambda: 100 << 20)
    contestants = {"rlhf_fast": print, "eager": print}
    assert list(harness.fitting(contestants, 20 << 20, copies=4)) == ["rlhf_fast", "eager"]
    assert capsys.readouterr().out == ""
    assert list(harness.fitting(contestants, 30 << 20, copies=4)) == ["rlhf_fast"]
    assert "without eager: takes about 120 MiB, 100 MiB are free" in capsys.readouterr().out


def test_every_kind_of_divergence_runs_at_one_vocabulary():
    vocabs = [32000, 151936, 49152]
    assert [len(kinds_at(v, vocabs)) for v in vocabs] == [1, 1, 3]
    assert len(kinds_at(500, [500])) == 3
