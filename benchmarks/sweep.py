"""python -m benchmarks <stem> --sweep [size ...]: how cost grows while one size grows 16-fold.

Time is fitted by a power of the size; memory is what a run holds beyond what was there before.
With --save both go to results/sweeps/<device>.csv and are plotted; `python -m benchmarks.sweep`
plots anew.

A benchmark takes part by three names: `SWEEP`, the options that are its sizes; `curves(sizes,
dtype)`, which gives what to run at some sizes, by name; and, if it avoids some large thing,
`whole(sizes, dtype)`: its name and bytes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import harness
from rlhf_fast.ops import matmul

FACTORS = (0.25, 0.5, 1, 2, 4)
FACTS = ("date", "commit", "command", "torch", "threads", "malloc", "load")
COLUMNS = (*FACTS, "stem", "dtype", "sizes", "swept", "size", "curve", "median_ms", "extra_bytes")
SEEN_BYTES = 1 << 20  # what is less than that is the allocator's, not the run's
AXES = {"median_ms": "ms (median)", "extra_bytes": "extra memory, MiB"}
WHOLE = "whole: "  # begins the curve of what is avoided, which has no time

Row = dict[str, object]


def run(stem: str, module: ModuleType, args) -> None:
    """Sweeps the sizes of a benchmark that `args.sweep` names, or all."""
    base = {name: _first(getattr(args, name)) for name in module.SWEEP}
    facts = {name: value for name, value in harness.describe().items() if name in FACTS}
    facts |= {"stem": stem, "sizes": " ".join(f"{n}={v}" for n, v in base.items())}
    rows: list[Row] = []
    for dtype in args.dtype:
        for swept in args.sweep or base:
            group = []
            for size in (max(1, int(base[swept] * factor)) for factor in FACTORS):
                found = measure(module, {**base, swept: size}, getattr(torch, dtype), args.seconds)
                group += [{"swept": swept, "size": size, "dtype": dtype, **row} for row in found]
            print(f"\n{stem}, {dtype}, {facts['sizes']}: {swept} grows")
            print_curves(group)
            rows += [{**facts, **row} for row in group]
    if args.save:
        print("saved to", record(rows))
        plot_all()


def measure(module: ModuleType, sizes: dict[str, int], dtype, seconds: float) -> list[Row]:
    """One row for each curve at these sizes."""
    runs, rows = module.curves(sizes, dtype), []
    contestants = [harness.Contestant(name, run) for name, run in runs.items()]
    with matmul.fast_float32():
        times = harness.time_all(contestants, 30, seconds)
        for name, function in runs.items():
            measured = harness.peak_is_known()
            extra = harness.peak_extra_bytes(function) if measured else ""
            median = harness.quantiles(times[name])["median_ms"]
            rows.append({"curve": name, "median_ms": median, "extra_bytes": extra})
    if hasattr(module, "whole"):
        name, num_bytes = module.whole(sizes, dtype)
        rows.append({"curve": WHOLE + name, "median_ms": "", "extra_bytes": num_bytes})
    return rows


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """k of the best y = c * x^k."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return math.nan
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)


def print_curves(rows: list[Row]) -> None:
    for name, points in _by_curve(rows).items():
        times, extra = _points(points, "median_ms"), _points(points, "extra_bytes")
        if times:
            cells = " ".join(f"{ms:10.2f}" for _, ms in times)
            print(f"  {name:28} ms  {cells}  {_growth('size', times)}")
        if extra:
            cells = " ".join(f"{num_bytes / 2**20:10.1f}" for _, num_bytes in extra)
            print(
                f"  {name:28} MiB {cells}  {_growth('size', _visible(points, 'extra_bytes'))}",
                flush=True,
            )


def folder() -> Path:
    return harness.RESULTS / "sweeps"


def record(rows: list[Row]) -> Path:
    return harness.append(folder() / f"{harness.device_name()}.csv", rows, COLUMNS)


def plot_all() -> None:
    """A plot for every benchmark in every file of sweeps, of its newest measurements."""
    for path in sorted(folder().glob("*.csv")):
        with path.open(newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["date"])
        for stem in sorted({row["stem"] for row in rows}):
            plot(path.stem, stem, newest([row for row in rows if row["stem"] == stem]))


def newest(rows: list[Row]) -> list[Row]:
    """Of one benchmark, oldest first: around the sizes swept last, the last of every point."""
    names = ("dtype", "threads", "malloc", "swept", "size", "curve")
    latest = {tuple(r[n] for n in names): r for r in rows if r["sizes"] == rows[-1]["sizes"]}
    return list(latest.values())


def plot(device: str, stem: str, rows: list[Row]) -> None:
    """Time above, memory below, a column for each size; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlhf_fast"  # the same file for the same data
    from matplotlib import pyplot

    sizes = {row["swept"]: set() for row in rows}
    for row in rows:
        sizes[row["swept"]].add(int(row["size"]))
    shown = [what for what in AXES if any(_visible(rows, what))]
    shape = {"figsize": (4 * len(sizes), 0.5 + 3 * len(shown))}
    shape |= {"squeeze": False, "sharex": "col", "sharey": "row"}
    figure, axes = pyplot.subplots(len(shown), len(sizes), **shape)
    colours: dict[str, str] = {}
    for (line, what), (column, swept) in product(enumerate(shown), enumerate(sizes)):
        axis, scale = axes[line, column], 1 if what == "median_ms" else 2**20
        for name, curve in _by_curve([r for r in rows if r["swept"] == swept]).items():
            colour = colours.setdefault(name, f"C{len(colours)}")
            if found := [(x, y / scale) for x, y in _visible(curve, what)]:
                style = ":" if WHOLE in name else "-o"
                label = name.replace(WHOLE, "") + _growth(swept, found)
                axis.loglog(*zip(*found), style, color=colour, label=label, markersize=3)
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
        if line == len(shown) - 1:
            axis.set_xlabel(swept)
            axis.set_xticks(sorted(sizes[swept]), labels=map(str, sorted(sizes[swept])))
            axis.minorticks_off()
        if column == 0:
            axis.set_ylabel(AXES[what])
    figure.suptitle(f"{stem}, {rows[0]['sizes']}, {device}", fontsize=9)
    figure.tight_layout()
    path = folder() / f"{device}-{stem}"
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def _by_curve(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each curve; what varies between curves of one name joins the name."""
    varying = [n for n in ("dtype", "threads", "malloc") if len({r.get(n) for r in rows}) > 1]
    curves: dict[str, list[Row]] = {}
    for row in rows:
        parts = [row["curve"], *(str(row[name]) for name in varying)]
        curves.setdefault(", ".join(parts), []).append(row)
    return curves


def _points(rows: list[Row], what: str) -> list[tuple[int, float]]:
    return sorted((int(row["size"]), float(row[what])) for row in rows if row[what] != "")


def _visible(rows: list[Row], what: str) -> list[tuple[int, float]]:
    """The points above the noise."""
    least = SEEN_BYTES if what == "extra_bytes" else 0
    return [(size, value) for size, value in _points(rows, what) if value >= least]


def _growth(size: str, points: list[tuple[int, float]]) -> str:
    return f" ~ {size}^{exponent(points):.2f}" if len(points) > 2 else ""


def _first(value):
    return value[0] if isinstance(value, list) else value


if __name__ == "__main__":
    plot_all()
