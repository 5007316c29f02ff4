"""python -m benchmarks.report: tables and plots of every machine's results, and the README's table.

Everything is made from results/*.csv: results/<device>.md with all measurements,
results/plots/<device>-<name>.{png,svg}, and the lines between the markers in README.md.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import report_plots, report_tables
from benchmarks.harness import RESULTS
from benchmarks.report_data import OURS, Case, case_of, load
from benchmarks.report_tables import headline

__all__ = ["OURS", "Case", "case_of", "headline", "load", "main", "readme_block"]

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report -->", "<!-- /benchmarks -->"


def readme_block() -> str:
    """What README.md must hold between its markers."""
    parts = []
    for path in sorted(RESULTS.glob("*.csv")):
        rows = load(path)
        threads = sorted({r["threads"] for r in rows})
        page = f"benchmarks/results/{path.stem}.md"
        parts += [
            f"Measured on {path.stem.replace('_', ' ')} ({'/'.join(threads)} threads), torch "
            f"{rows[-1]['torch']}; opponents with tuned malloc; [all measurements]({page}):",
            "",
            f"![Speed against others](benchmarks/results/plots/{path.stem}-overview.png)",
            "",
            headline(rows),
            "",
        ]
    return "\n".join([BEGIN, *parts, END])


def main() -> None:
    for path in sorted(RESULTS.glob("*.csv")):
        rows, plots = load(path), RESULTS / "plots"
        for old in plots.glob(f"{path.stem}-*"):
            old.unlink()
        names = report_plots.draw(path.stem, rows, plots)
        path.with_suffix(".md").write_text(report_tables.page(path.stem, rows, names))
    text = README.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    README.write_text(text[:begin] + readme_block() + text[end:])


if __name__ == "__main__":
    main()
