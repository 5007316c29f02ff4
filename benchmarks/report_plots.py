"""Plots of what was measured: how much faster overall, then every contest, section by section."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

from benchmarks import report_data
from benchmarks.report_data import Contest, Row, is_limit, is_ours, median, section_of

OURS, RIVAL, LIMIT, LOSS = "#1b6ca8", "#9aa5b1", "#2b2b2b", "#c8553d"
SHAPES = "os^v"
RIVALS = ("#e08e45", "#7a9e7e", "#a06cd5", "#c8553d", "#5fa8d3", "#b5838d", "#8d99ae", "#606c38")


def draw(device: str, rows: list[Row], folder: Path) -> list[str]:
    """Writes <device>-<name>.png and .svg, marked by what they show; returns the names."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlhf_fast"  # the same file for the same data
    matplotlib.rcParams["font.size"] = 8
    matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False
    folder.mkdir(exist_ok=True)
    mark = {"Description": fingerprint(rows)}
    drawn = figures(device.replace("_", " "), rows)
    for name, figure in drawn.items():
        path = str(folder / f"{device}-{name}")
        figure.savefig(
            f"{path}.png", dpi=120, bbox_inches="tight", metadata={"Software": None, **mark}
        )
        figure.savefig(
            f"{path}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": None, **mark}
        )
    pyplot.close("all")
    return list(drawn)


def figures(title: str, rows: list[Row]) -> dict[str, object]:
    """By name; the sections are named by their first words."""
    found = report_data.headlines(rows)
    if not found:
        return {}
    drawn = {"overview": overview(report_data.highlights(found), title)}
    if remembered := [c for c in found if _peaks(c)]:
        drawn["memory"] = memory(remembered, title)
    looks = _looks(found)
    for section in dict.fromkeys(section_of(c.stem) for c in found):
        name = section.split(",")[0].lower().replace(" ", "-")
        shown = [c for c in found if section_of(c.stem) == section]
        drawn[name] = times(shown, section, title, looks)
    return drawn


def fingerprint(rows: list[Row]) -> str:
    """Of the measurements; plots carry it, so that old ones are noticed."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _looks(found: list[Contest]) -> dict[str, tuple[str, str]]:
    """Colour and shape of everyone else, the same in all plots; who is met most comes first."""
    names = Counter(_family(r) for c in found for r in c.rows if not is_limit(r) and not is_ours(r))
    order = sorted(names, key=lambda name: (-names[name], name))
    return {
        name: (RIVALS[i % len(RIVALS)], SHAPES[i // len(RIVALS) % len(SHAPES)])
        for i, name in enumerate(order)
    }


def overview(found: list[Contest], device: str):
    """A bar per contest: our speed as a multiple of the fastest other's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 1.1 + 0.23 * len(found)))
    for place, contest in enumerate(found):
        colour = LOSS if contest.verdict == "loss" else RIVAL if contest.verdict == "tie" else OURS
        axes.barh(place, contest.gain - 1, left=1, height=0.62, color=colour)
        text = f" {contest.gain:.1f}x, {contest.rival['contestant']}"
        text += ", bound by the call" if contest.is_call_bound else ""
        axes.text(max(contest.gain, 1), place, text, va="center", fontsize=7, color="#444444")
    axes.axvline(1, color=LIMIT, linewidth=0.8)
    _finish(axes, found, "times as fast as the fastest other (red: slower, grey: within 10 %)")
    axes.set_xlim(min(0.5, *(c.gain for c in found)) * 0.9, max(c.gain for c in found) * 1.2)
    figure.suptitle(f"Speed against the fastest other implementation, {device}", fontsize=9)
    figure.tight_layout()
    return figure


def memory(found: list[Contest], device: str):
    """Peak memory of ours as a share of the fastest other's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 1.2 + 0.23 * len(found)))
    for place, contest in enumerate(found):
        ours, rival = _peaks(contest)
        axes.barh(place, ours / rival, height=0.62, color=OURS if ours <= rival else LOSS)
        text = f" {ours / rival:.0%} of {contest.rival['contestant']}"
        axes.text(ours / rival, place, text, va="center", fontsize=7, color="#444444")
    axes.axvline(1, color=LIMIT, linewidth=0.8)
    _finish(axes, found, "peak memory as a share of the fastest other's", scale="linear")
    axes.set_xlim(0, max(1.0, *(a / b for a, b in map(_peaks, found))) * 1.05)
    figure.suptitle(f"Peak memory against the fastest other implementation, {device}", fontsize=9)
    figure.tight_layout()
    return figure


def times(found: list[Contest], section: str, device: str, looks: dict[str, tuple[str, str]]):
    """A line per contest with a dot for everyone in it, and a bar where the machine's limit is."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 1.7 + 0.3 * len(found)))
    legend = {}  # by label
    for place, contest in enumerate(found):
        rows = [r for r in contest.rows if not is_limit(r)]
        span = [median(r) for r in rows]
        axes.plot([min(span), max(span)], [place] * 2, color="#dddddd", linewidth=1, zorder=1)
        for row in sorted(rows, key=is_ours, reverse=True):
            label, style = _style(contest, row, looks)
            legend.setdefault(label, axes.plot(median(row), place, **style)[0])
        if contest.floor_ms and not contest.is_call_bound:
            style = {"marker": "|", "color": LIMIT, "markersize": 11, "linestyle": ""}
            line = axes.plot(contest.floor_ms, place, zorder=2, **style)[0]
            legend.setdefault("machine's limit", line)
    _finish(axes, found, "ms (median)")
    labels = sorted(legend, key=lambda label: (not label.startswith("rlhf_fast"), label))
    handles = [legend[label] for label in labels]
    axes.legend(
        handles, labels, fontsize=7, frameon=False, ncol=4, loc="upper center",
        bbox_to_anchor=(0.35, -0.55 / (1.0 + 0.3 * len(found)) - 0.02),
    )  # fmt: skip
    figure.suptitle(f"{section}, {device}", fontsize=9)
    figure.tight_layout()
    return figure


def _style(contest: Contest, row: Row, looks: dict[str, tuple[str, str]]) -> tuple[str, dict]:
    """The legend's words for a measurement, and how its point looks."""
    if not is_ours(row):
        colour, shape = looks[_family(row)]
        look = {"color": colour, "marker": shape, "markersize": 5, "zorder": 3}
        return _family(row), look | {"linestyle": ""}
    is_best = row is contest.ours
    look = {"color": OURS, "marker": "D", "markersize": 6, "zorder": 4, "linestyle": ""}
    label = "rlhf_fast" if is_best else "rlhf_fast, other settings"
    return label, look | {"alpha": 1.0 if is_best else 0.5}


def _family(row: Row) -> str:
    """A contestant's name without its settings."""
    return row["contestant"].split(",")[0]


def _finish(axes, found: list[Contest], label: str, scale: str = "log") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yticks(range(len(found)), [_label(c) for c in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale(scale)
    if scale == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _label(contest: Contest) -> str:
    _, kind, dtype, *_ = contest.case
    what = ", ".join(part for part in (kind, dtype) if part)
    return f"{contest.stem}: {what}" if what else contest.stem


def _peaks(contest: Contest) -> tuple[float, float] | None:
    ours, rival = (contest.peaks.get(row["contestant"]) for row in (contest.ours, contest.rival))
    return (ours[0], rival[0]) if ours and rival else None
