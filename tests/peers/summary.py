"""What the comparisons with other packages found, as one table at the end of a test run."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

VARIABLE = "RLHF_FAST_PEERS_TABLE"
"""Names a file that rows are appended to, for whoever runs several environments."""
PACKAGES = ("trl", "openrlhf", "verl", "llamafactory", "liger_kernel", "scikit_learn")
VALUES = ": values and gradients"
Row = tuple[str, str, str, str]


def rows(reports) -> list[Row]:
    """(package, version, what was compared, agreed) from pytest's reports of single tests.

    A test that records the property `trajectory` is a row of its own; others count by file. One
    that records `package` is about that one, whatever its file is called.
    """
    trajectories: dict[tuple[str, str], bool] = {}
    files: dict[tuple[str, str], list[bool]] = {}
    for report in reports:
        if "peers" not in report.keywords or report.when != "call" or report.skipped:
            continue
        file = Path(report.nodeid.split("::")[0]).stem.removeprefix("test_")
        properties = dict(report.user_properties)
        package = properties.get("package")
        package = package or next((name for name in PACKAGES if file.startswith(name)), None)
        if package is None:
            continue
        if "trajectory" in properties:
            trajectories[package, properties["trajectory"]] = report.passed
        else:
            what = file.removeprefix(package).strip("_")
            what += ": undo, refusal, report" if "package" in properties else VALUES
            files.setdefault((package, what), []).append(report.passed)
    found = [(*key, "yes" if agreed else "NO") for key, agreed in trajectories.items()]
    found += [(*key, f"{sum(all_)} of {len(all_)}") for key, all_ in files.items()]
    return [(name, importlib.metadata.version(name), *rest) for name, *rest in sorted(found)]


def table(found: list[Row]) -> str:
    lines = [("package", "version", "patched and not, or ours and theirs", "agreed"), *found]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    shown = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([shown[0], "-" * (sum(widths) + 6), *shown[1:]])


def report(terminal) -> None:
    """Writes the table of a run in which there was anything to compare."""
    reports = [r for kind in ("passed", "failed") for r in terminal.stats.get(kind, [])]
    if not (found := rows(r for r in reports if hasattr(r, "keywords"))):
        return
    terminal.section("comparisons with other packages")
    terminal.write_line(table(found))
    if path := os.environ.get(VARIABLE):
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
