"""The published tables say what was measured."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks import harness, report, report_data, report_plots, report_tables


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


@pytest.mark.parametrize("name", ["README.md", "performance.md", "integrations.md"])
def test_documents_agree_with_the_results(name):
    path, block = next((p, b) for p, b in report.pages().items() if p.name == name)
    text = path.read_text()
    begin, end = report.between_markers(text)
    assert text[begin:end] == block, "run python -m benchmarks.report"


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.csv")), ids=lambda p: p.stem)
def test_pages_and_plots_agree_with_the_results(path):
    rows = report.load(path)
    plots = sorted((path.parent / "plots").glob(f"{path.stem}-*"))
    names = re.findall(rf"plots/{path.stem}-(.+)\.png", path.with_suffix(".md").read_text())
    shown = {f"{path.stem}-{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {plot.name for plot in plots} == shown
    for plot in plots:
        mark = report_plots.fingerprint(rows).encode()
        assert mark in plot.read_bytes(), f"{plot.name}: run python -m benchmarks.report"
    assert path.with_suffix(".md").read_text() == report_tables.page(path.stem, rows, names)


def test_what_is_quoted_by_hand_has_no_figures():
    """So that nothing beside the generated table can disagree with the results."""
    text = report.PERFORMANCE.read_text()
    why = text[text.index("## Why") : text.index("## Reproduce")]
    assert not re.search(r"\d+(\.\d+)?\s*(ms|µs|x|times|%|GB|MiB)\b", why)


def test_the_latest_measurement_of_the_largest_shape_is_told(results):
    path = harness.record("logps", [row("rlhf_fast", 5.0), row("eager", 9.0)])
    harness.record("logps", [row("rlhf_fast", 2.0), row("eager", 8.0), row("other", 6.0)])
    harness.record("logps", [row("rlhf_fast", 1.0, vocab=10), row("eager", 50.0, vocab=10)])
    table = report.headline(report.load(path))
    assert "(fp32, N=8 V=100)" in table
    assert "| logps, forward | 2 | 6 (other) | **3.0x** |  | 50% |" in table
    assert "50 (eager)" not in table


def test_losses_are_told(results):
    path = harness.record("logps", [row("rlhf_fast", 5.0), row("eager", 4.0)])
    harness.record("gae", [row("rlhf_fast", 5.0), row("eager", 5.2)])
    harness.record("kl", [row("rlhf_fast", 5.0), row("eager", 15.0)])
    table = report.headline(report.load(path))
    assert "**0.80x (slower)**" in table and "**1.04x (tie)**" in table
    lost = "1 won, 1 tied (within 10 %), 1 lost: logps, forward (fp32, N=8 V=100) to eager by 1.2x."
    assert lost in table
    told = report_tables.balance(report.load(path))
    assert "| logps | 0 | 0 | 1 | 0.8 / 0.8 / 0.8 | 20% |" in told
    assert "| **all** | 1 | 1 | 1 | 0.8 / 1 / 3 | 20% |" in told
    assert "* logps, forward: 1.2x to eager (fp32, N=8 V=100, default malloc)" in told


def test_a_case_is_told_of_its_newest_run_alone(results):
    """Contestants of several runs did not take turns."""

    def old(row):
        return row | {"date": "2001-01-01"}

    path = harness.record("gae", [row("rlhf_fast", 3.0), row("eager", 4.0)])
    harness.record("gae", [old(row("rlhf_fast", 1.0)), old(row("gone", 2.0))])
    newer = {"date": "2999-01-01 00:00:00"}
    harness.record("gae", [row("rlhf_fast", 0.5) | newer])  # without anybody to compare with
    assert {r["contestant"]: r["median_ms"] for r in report.load(path)} == {
        "rlhf_fast": "3.0",
        "eager": "4.0",
    }


def test_superseded_lines_can_be_dropped(results, capsys):
    path = harness.record("gae", [row("rlhf_fast", 3.0), row("eager", 4.0)])
    harness.record("gae", [row("rlhf_fast", 5.0), row("eager", 6.0)])
    before = report.load(path)
    report.prune()
    assert report.load(path) == before and len(path.read_text().splitlines()) == 3
    report.print_ages()
    assert "gae                         2 rows" in capsys.readouterr().out


def test_a_table_gets_the_columns_that_it_lacks(results):
    path = results / "some.csv"
    path.write_text("date,stem\n2001-01-01,gae\n")
    harness.append(path, [{"date": "2002-01-01", "device": "x"}])
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert first["stem"] == "gae" and first["device"] == "" and second["device"] == "x"


def test_where_it_was_measured_is_recorded(results):
    facts = harness.describe()
    assert facts["device"] and facts["commit"] != "unknown" and facts["torch"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", facts["date"])


def test_what_is_bound_by_the_call_gets_no_share_of_the_limit(results):
    rows = [row("rlhf_fast", 0.2) | {"floor_ms": 1e-4}, row("eager", 0.1) | {"floor_ms": 1e-4}]
    rows = report.load(harness.record("whiten", rows))
    assert "| whiten" not in report.headline(rows)
    assert "to eager by 2x, bound by the call" in report.headline(rows)
    assert "| whiten | 0 | 0 | 1 | 0.5 / 0.5 / 0.5 |  |" in report_tables.balance(rows)


def test_memory_stands_beside_time(results):
    times = [row("rlhf_fast", 5.0), row("TRL", 9.0)]
    times = [r | {"malloc": "tuned"} for r in times]
    peaks = [row("rlhf_fast", 9.0, peak_bytes=1 << 20), row("TRL", 20.0, peak_bytes=3 << 20)]
    peaks = [r | {"malloc": "default"} for r in peaks]
    table = report.headline(report.load(harness.record("training", times + peaks)))
    assert "| 5 | 9 (TRL) | **1.80x** | 1 / 3 MiB |" in table


def test_patched_trainers_are_told_before_and_after(results):
    def step(contestant, malloc, median, **facts):
        sizes = {"model": "m", "kind": "DPO", "tokens": 4, "vocab": 7}
        return row(contestant, median, **sizes, **facts) | {"malloc": malloc}

    rows = [
        step("TRL", "default", 90.0, peak_bytes=9 << 20),
        step("rlhf_fast in TRL", "default", 30.0, peak_bytes=4 << 20),
        step("TRL", "tuned", 50.0),
        step("rlhf_fast in TRL", "tuned", 25.0),
    ]
    path = harness.record("integrations", rows)
    table = report_tables.integrations(report.load(path))
    assert "| fp32, N=4 V=7 m | before, ms | after |" in table
    assert "| DPO | 90 | 30 | 3.0x | 2.0x | 9 | 4 |" in table
    harness.record("gae", [row("rlhf_fast", 1.0), row("eager", 2.0)])
    assert "gae" not in report.integrations_block()


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
    shown = {"README": "1.80x", "PERFORMANCE": "1.8 / 1.8 / 1.8", "INTEGRATIONS": "made by"}
    for name in shown:
        document = results / f"{name}.md"
        document.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
        monkeypatch.setattr(report, name, document)
    report.write()
    for name, text in shown.items():
        written = (results / f"{name}.md").read_text()
        assert text in written and written.endswith("after\n")
    names = {p.suffix for p in (results / "plots").iterdir()}
    assert names == {".png", ".svg"}
