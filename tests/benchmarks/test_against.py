"""This tree against an older one: both are measured in turns, and only ours."""

import math
import re

import pytest

from benchmarks import against
from benchmarks.plan import Plan

SMALLEST = ["--threads", "1", "--malloc", "default", "--seconds", "0.01", "--batch", "8"]


def test_both_trees_are_measured(monkeypatch, capsys):
    asked = []

    def built(revision):
        asked.append(revision)
        return against.ROOT

    monkeypatch.setattr(against, "built", built)
    monkeypatch.setattr(against, "ROUNDS", 1)
    against.compare("HEAD~1", {"whiten": Plan(1, SMALLEST)}, ["--against", "HEAD~1"])
    assert asked == ["HEAD~1"]
    shown = capsys.readouterr().out
    *_, line = shown.splitlines()
    title, before, after, ratio = re.split(r"\s{2,}", line)
    assert title == "whiten, forward, batch=8 length=1024, 1, default, rlhf_fast"
    assert math.isclose(float(after) / float(before), float(ratio), abs_tol=0.1)
    assert "eager" not in shown


def test_a_tree_that_fails_is_told(tmp_path):
    with pytest.raises(SystemExit, match="failed:"):
        against.measure(tmp_path, ["no_such_stem"])


def test_a_revision_must_exist():
    with pytest.raises(SystemExit, match="must name a revision, got 'nowhere'"):
        against.built("nowhere")
