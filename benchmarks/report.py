"""python -m benchmarks.report: tables and plots of every machine's results, and the README's table.

Everything is made from results/*.csv: results/<device>.md with all measurements,
results/plots/<device>-<stem>.{png,svg}, and the lines between the markers in README.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report -->", "<!-- /benchmarks -->"
OURS = "rlhf_fast"
FLOORS = ("products alone",)

Row = dict[str, str]
Case = tuple[str, ...]


def load(path: Path) -> list[Row]:
    """The latest measurement of every contestant in every case."""
    latest: dict[tuple[str, ...], Row] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            latest[(*case_of(row), row["contestant"])] = row
    return list(latest.values())


def case_of(row: Row) -> Case:
    """What contestants must share to be compared."""
    return tuple(row[n] for n in ("stem", "kind", "dtype", "shape", "threads", "malloc"))


def by_case(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    cases: dict[Case, list[Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    return cases


def is_ours(row: Row) -> bool:
    return row["contestant"].startswith(OURS)


def is_rival(row: Row) -> bool:
    return not is_ours(row) and not row["contestant"].startswith(FLOORS)


def headline(rows: list[Row]) -> str:
    """One line per op and kind: our best against the fastest other, at the largest shape measured.

    Only with tuned malloc where that was measured: the harder comparison.
    """
    cases = by_case(rows)
    tuned = {case[0] for case in cases if case[5] == "tuned"}
    best: dict[tuple[str, str, str], tuple[Case, list[Row]]] = {}
    for case, group in cases.items():
        stem, kind, dtype, _, threads, malloc = case
        comparable = any(map(is_ours, group)) and any(map(is_rival, group))
        if not comparable or (stem in tuned and malloc != "tuned"):
            continue
        key = (stem, kind, dtype)
        if key not in best or (_size(case), threads) > (_size(best[key][0]), best[key][0][4]):
            best[key] = (case, group)
    lines = [
        "| op | case | ours, ms | fastest other, ms | faster | x floor |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (stem, kind, dtype), (case, group) in sorted(best.items()):
        ours = min(filter(is_ours, group), key=_median)
        rival = min(filter(is_rival, group), key=_median)
        floor = f"{_median(ours) / float(ours['floor_ms']):.1f}" if ours["floor_ms"] else ""
        described = ", ".join(part for part in (kind, dtype, _short(case[3])) if part)
        lines.append(
            f"| {stem} | {described} | {_ms(_median(ours))} | {_ms(_median(rival))} "
            f"({rival['contestant']}) | {_median(rival) / _median(ours):.1f}x | {floor} |"
        )
    return "\n".join(lines)


def _short(shape: str) -> str:
    return shape.replace("tokens=", "N=").replace("vocab=", "V=").replace("width=", "D=")


def _size(case: Case) -> int:
    size = 1
    for part in case[3].split():
        value = part.split("=")[1]
        size *= int(value) if value.isdigit() else 1
    return size


def _median(row: Row) -> float:
    return float(row["median_ms"])


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def full_table(device: str, rows: list[Row]) -> str:
    lines = [f"# {device}", ""]
    for case, group in by_case(rows).items():
        stem, kind, dtype, shape, threads, malloc = case
        title = ", ".join(part for part in (stem, kind, dtype, shape) if part)
        lines += [f"## {title}, {threads} thread(s), {malloc} malloc", ""]
        lines += ["| contestant | median ms | p20 | p80 | x floor | RMS error | |"]
        lines += ["|---|---:|---:|---:|---:|---:|---|"]
        for r in sorted(group, key=_median):
            floor = f"{_median(r) / float(r['floor_ms']):.2f}" if r["floor_ms"] else ""
            lines.append(
                f"| {r['contestant']} | {r['median_ms']} | {r['p20_ms']} | {r['p80_ms']} | {floor} "
                f"| {r['rms_error']} | {r['details']} |"
            )
        first = group[0]
        lines += [
            "",
            f"{first['date']}, commit {first['commit']}, torch {first['torch']}, load "
            f"{first['load']}: `{first['command']}`",
            "",
        ]
    return "\n".join(lines)


def plot(device: str, stem: str, rows: list[Row]) -> None:
    """Bars of every case with more than one contestant, relative to the floor or to the fastest."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlhf_fast"  # the same file for the same data
    from matplotlib import pyplot

    cases = {c: g for c, g in by_case(rows).items() if len(g) > 1 and c[5] != "default"}
    cases = cases or {c: g for c, g in by_case(rows).items() if len(g) > 1}
    if not cases:
        return
    names = sorted(
        {r["contestant"] for g in cases.values() for r in g}, key=lambda n: (OURS not in n, n)
    )
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.16 * len(names) * len(cases)))
    step = 0.8 / len(names)
    for k, name in enumerate(names):
        found = [(i, r) for i, g in enumerate(cases.values()) for r in g if r["contestant"] == name]
        axes.barh(
            [i + k * step for i, _ in found],
            [_median(r) for _, r in found],
            step,
            label=name,
            color=f"C{k}",
        )
    axes.set_yticks([i + 0.4 for i in range(len(cases))])
    axes.set_yticklabels([", ".join(p for p in c[1:5] if p) + " thr." for c in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms (median)")
    axes.set_title(f"{stem}, {device}", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    folder = RESULTS / "plots"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{device}-{stem}.png", dpi=110, metadata={"Software": None})
    figure.savefig(folder / f"{device}-{stem}.svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def readme_block() -> str:
    """What README.md must hold between its markers."""
    parts = []
    for path in sorted(RESULTS.glob("*.csv")):
        rows = load(path)
        threads = sorted({r["threads"] for r in rows})
        parts += [
            f"Measured on {path.stem.replace('_', ' ')} ({'/'.join(threads)} threads), torch "
            f"{rows[-1]['torch']}:",
            "",
            headline(rows),
            "",
        ]
    return "\n".join([BEGIN, *parts, END])


def main() -> None:
    for path in sorted(RESULTS.glob("*.csv")):
        rows = load(path)
        path.with_suffix(".md").write_text(full_table(path.stem, rows))
        for stem in sorted({r["stem"] for r in rows}):
            plot(path.stem, stem, [r for r in rows if r["stem"] == stem])
    text = README.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    README.write_text(text[:begin] + readme_block() + text[end:])


if __name__ == "__main__":
    main()
