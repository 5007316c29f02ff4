"""The published tables say what was measured."""

import csv
from pathlib import Path

import pytest

from benchmarks import harness, report, report_data


def row(contestant, median, **facts):
    facts = {
        "threads": 1,
        "kind": "forward",
        "dtype": "float32",
        "tokens": 8,
        "vocab": 100,
        **facts,
    }
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
    assert "| logps, forward: fp32, N=8 V=100 | 2 | 6 (other) | **3.0x** |  | 50% |" in table
    assert "50 (eager)" not in table


def test_losses_are_told(results):
    path = harness.record("logps", [row("rlhf_fast", 5.0), row("eager", 4.0)])
    harness.record("gae", [row("rlhf_fast", 5.0), row("eager", 5.2)])
    harness.record("kl", [row("rlhf_fast", 5.0), row("eager", 15.0)])
    table = report.headline(report.load(path))
    assert "**0.80x (slower)**" in table and "**1.04x (tie)**" in table
    lost = "1 won, 1 tied (within 10 %), 1 lost: logps, forward, to eager (1.2x slower)."
    assert lost in table


def test_what_is_bound_by_the_call_gets_no_share_of_the_limit(results):
    rows = [row("rlhf_fast", 0.1) | {"floor_ms": 1e-4}, row("eager", 0.2) | {"floor_ms": 1e-4}]
    table = report.headline(report.load(harness.record("whiten", rows)))
    assert "Bound by the call, as the work takes under 10 µs: whiten, forward 2.0x." in table
    assert "| whiten" not in table


def test_memory_stands_beside_time(results):
    times = [row("rlhf_fast", 5.0), row("TRL", 9.0)]
    times = [r | {"malloc": "tuned"} for r in times]
    peaks = [row("rlhf_fast", 9.0, peak_bytes=1 << 20), row("TRL", 20.0, peak_bytes=3 << 20)]
    peaks = [r | {"malloc": "default"} for r in peaks]
    table = report.headline(report.load(harness.record("training", times + peaks)))
    assert "| 5 | 9 (TRL) | **1.80x** | 1 MiB / 3 MiB |" in table


def test_every_benchmark_has_a_section():
    files = Path(report.__file__).parent.glob("bench_*.py")
    stems = {stem for stems in report_data.SECTIONS.values() for stem in stems}
    assert stems == {path.stem.removeprefix("bench_") for path in files}
    assert report_data.section_of("something new") == report_data.OTHER


def test_what_has_no_column_is_kept_as_details(results):
    path = harness.record("logps", [row("rlhf_fast", 5.0, odd=7)])
    harness.record("gae", [row("rlhf_fast", 5.0, batch=3)])
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert first["details"].endswith("odd=7") and first["shape"] == "tokens=8 vocab=100"
    assert second["stem"] == "gae" and second["shape"] == "tokens=8 vocab=100 batch=3"


def test_plots_and_tables_are_written(results, monkeypatch):
    harness.record("logps", [row("rlhf_fast", 5.0), row("eager", 9.0)])
    readme = results / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    report.main()
    assert "1.80x" in readme.read_text() and readme.read_text().endswith("after\n")
    names = {p.suffix for p in (results / "plots").iterdir()}
    assert names == {".png", ".svg"}
