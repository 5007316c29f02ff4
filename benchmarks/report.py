"""python -m benchmarks.report: tables and plots of every machine's results, and the README's table.

Everything is made from results/*.csv: results/<device>.md with all measurements,
results/plots/<device>-<name>.{png,svg}, and the lines between the markers in README.md and in
docs/performance.md and docs/integrations.md. With --ages: when every benchmark was last measured,
and how many commits have changed the package since. With --prune: drops the lines that newer ones
supersede.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, report_plots, report_tables
from benchmarks.harness import RESULTS
from benchmarks.report_data import OURS, Case, Row, case_of, load
from benchmarks.report_tables import headline

__all__ = ["OURS", "Case", "Row", "case_of", "headline", "load", "main", "pages"]

ROOT = Path(__file__).resolve().parents[1]
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
INTEGRATIONS = ROOT / "docs" / "integrations.md"
BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report -->", "<!-- /benchmarks -->"


def readme_block() -> str:
    """What README.md must hold between its markers."""

    def lines(path: Path, rows: list[Row]) -> list[str]:
        page = f"benchmarks/results/{path.stem}.md"
        overview = f"benchmarks/results/plots/{path.stem}-overview.png"
        what = "opponents with tuned malloc"
        return [
            f"{report_tables.provenance(path.stem, rows)}; {what}; [all measurements]({page}):",
            "",
            f"![Speed against others]({overview})",
            "",
            headline(rows),
        ]

    return _block(lines)


def performance_block() -> str:
    """What docs/performance.md must hold between its markers."""

    def lines(path: Path, rows: list[Row]) -> list[str]:
        return [f"On {report_tables.provenance(path.stem, rows)}:", "", report_tables.balance(rows)]

    return _block(lines)


def integrations_block() -> str:
    """What docs/integrations.md must hold between its markers."""

    def lines(path: Path, rows: list[Row]) -> list[str]:
        rows = [row for row in rows if row["stem"] == "integrations"]
        if not rows:
            return []
        where = report_tables.provenance(path.stem, rows)
        return [f"A step on {where}:", "", report_tables.integrations(rows)]

    return _block(lines)


def _block(lines: Callable[[Path, list[Row]], list[str]]) -> str:
    """Of every machine, between the markers."""
    parts = []
    for path in sorted(RESULTS.glob("*.csv")):
        if found := lines(path, load(path)):
            parts += [*found, ""]
    return "\n".join([BEGIN, *parts, END])


def pages() -> dict[Path, str]:
    """The documents with a generated part, and that part as it must be."""
    return {
        README: readme_block(),
        PERFORMANCE: performance_block(),
        INTEGRATIONS: integrations_block(),
    }


def between_markers(text: str) -> tuple[int, int]:
    return text.index(BEGIN), text.index(END) + len(END)


def write() -> None:
    for path in sorted(RESULTS.glob("*.csv")):
        rows, plots = load(path), RESULTS / "plots"
        for old in plots.glob(f"{path.stem}-*"):
            old.unlink()
        names = report_plots.draw(path.stem, rows, plots)
        path.with_suffix(".md").write_text(report_tables.page(path.stem, rows, names))
    for path, block in pages().items():
        text = path.read_text()
        begin, end = between_markers(text)
        path.write_text(text[:begin] + block + text[end:])


def print_ages() -> None:
    """When each benchmark was measured, and the commits to kernels and package since."""
    for path in sorted(RESULTS.glob("*.csv")):
        print(path.stem)
        runs: dict[tuple[str, str, str], int] = {}
        for row in load(path):
            key = row["stem"], row["date"], row["commit"]
            runs[key] = runs.get(key, 0) + 1
        for (stem, date, commit), count in sorted(runs.items()):
            print(f"  {stem:24} {count:4} rows  {date:19}  {commit:16} {commits_since(commit)}")


def commits_since(commit: str) -> str:
    span = f"{commit.removesuffix('-dirty')}..HEAD"
    command = ["git", "rev-list", "--count", span, "--", "csrc", "rlhf_fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "of another history" if done.returncode else f"{done.stdout.strip()} commits ago"


def prune() -> None:
    """Drops what newer runs supersede."""
    for path in sorted(RESULTS.glob("*.csv")):
        rows = load(path)
        path.unlink()
        print(f"{len(rows)} rows kept in {harness.append(path, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--ages", action="store_true", help="print how old results are")
    parser.add_argument("--prune", action="store_true", help="drop superseded lines")
    args = parser.parse_args()
    if args.prune:
        prune()
    if args.ages:
        print_ages()
    else:
        write()


if __name__ == "__main__":
    main()
