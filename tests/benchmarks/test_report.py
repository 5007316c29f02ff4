"""The published tables say what was measured."""

import csv

import pytest

from benchmarks import harness, report


def row(contestant, median, **facts):
    facts = {"kind": "forward", "dtype": "float32", "tokens": 8, "vocab": 100, **facts}
    times = {"median_ms": median, "p20_ms": median, "p80_ms": median, "runs": 3}
    return {**harness.describe(), **facts, "contestant": contestant, **times, "floor_ms": 1.0}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_readme_agrees_with_the_results():
    text = report.README.read_text()
    begin, end = text.index(report.BEGIN), text.index(report.END) + len(report.END)
    assert text[begin:end] == report.readme_block(), "run python -m benchmarks.report"


def test_the_latest_measurement_of_the_largest_shape_is_told(results):
    path = harness.record("logps", [row("rlhf_fast", 5.0), row("eager", 9.0)])
    harness.record("logps", [row("rlhf_fast", 2.0), row("eager", 8.0), row("other", 6.0)])
    harness.record("logps", [row("rlhf_fast", 1.0, vocab=10), row("eager", 50.0, vocab=10)])
    table = report.headline(report.load(path))
    assert "| logps | forward, float32, N=8 V=100 | 2.00 | 6.00 (other) | 3.0x | 2.0 |" in table
    assert "50.0" not in table


def test_what_has_no_column_is_kept_as_details(results):
    path = harness.record("logps", [row("rlhf_fast", 5.0, odd=7)])
    harness.record("gae", [row("rlhf_fast", 5.0, batch=3)])
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert first["details"] == "odd=7" and first["shape"] == "tokens=8 vocab=100"
    assert second["stem"] == "gae" and second["shape"] == "tokens=8 vocab=100 batch=3"


def test_plots_and_tables_are_written(results, monkeypatch):
    harness.record("logps", [row("rlhf_fast", 5.0), row("eager", 9.0)])
    readme = results / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    report.main()
    assert "1.8x" in readme.read_text() and readme.read_text().endswith("after\n")
    names = {p.suffix for p in (results / "plots").iterdir()}
    assert names == {".png", ".svg"}
