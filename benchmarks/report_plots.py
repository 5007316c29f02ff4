"""Plots of what was measured: how much faster overall, then every contest, section by section."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report_data
from benchmarks.report_data import Contest, Row, is_limit, is_ours, median, section_of

OURS, RIVAL, LIMIT, LOSS = "#1b6ca8", "#9aa5b1", "#2b2b2b", "#c8553d"
RIVALS = ("#e08e45", "#7a9e7e", "#a06cd5", "#c8553d", "#5fa8d3", "#b5838d", "#8d99ae", "#606c38")


def draw(device: str, rows: list[Row], folder: Path) -> list[str]:
    """Writes <device>-<name>.png and .svg; returns the names."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlhf_fast"  # the same file for the same data
    matplotlib.rcParams["font.size"] = 8
    matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False
    folder.mkdir(exist_ok=True)
    found = report_data.headlines(rows)
    if not found:
        return []
    title = device.replace("_", " ")
    figures = {"overview": overview(report_data.highlights(found), title)}
    if remembered := [c for c in found if _peaks(c)]:
        figures["memory"] = memory(remembered, title)
    for section in dict.fromkeys(section_of(c.stem) for c in found):
        name = section.split(",")[0].lower().replace(" ", "-")
        figures[name] = times([c for c in found if section_of(c.stem) == section], section, title)
    for name, figure in figures.items():
        figure.savefig(folder / f"{device}-{name}.png", dpi=120, metadata={"Software": None})
        figure.savefig(folder / f"{device}-{name}.svg", metadata={"Date": None, "Creator": None})
    from matplotlib import pyplot

    pyplot.close("all")
    return list(figures)


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
    axes.set_xlim(min(0.5, *(c.gain for c in found)) * 0.9, max(c.gain for c in found) * 4)
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
    axes.set_xlim(0, max(1.0, *(a / b for a, b in map(_peaks, found))) * 1.35)
    figure.suptitle(f"Peak memory against the fastest other implementation, {device}", fontsize=9)
    figure.tight_layout()
    return figure


def times(found: list[Contest], section: str, device: str):
    """A line per contest with a dot for everyone in it, and a bar where the machine's limit is."""
    from matplotlib import pyplot

    names = {_family(r) for c in found for r in c.rows if not is_limit(r) and not is_ours(r)}
    colours = {name: RIVALS[i % len(RIVALS)] for i, name in enumerate(sorted(names))}
    figure, axes = pyplot.subplots(figsize=(8.5, 1.7 + 0.3 * len(found)))
    for place, contest in enumerate(found):
        rows = [r for r in contest.rows if not is_limit(r)]
        span = [median(r) for r in rows]
        axes.plot([min(span), max(span)], [place] * 2, color="#dddddd", linewidth=1, zorder=1)
        if contest.floor_ms and not contest.is_call_bound:
            axes.plot(contest.floor_ms, place, "|", color=LIMIT, markersize=11, zorder=2)
        for row in rows:
            mine = is_ours(row)
            axes.plot(
                median(row),
                place,
                "D" if mine else "o",
                color=OURS if mine else colours[_family(row)],
                markersize=6 if mine else 5,
                alpha=1.0 if row is contest.ours or not mine else 0.5,
                zorder=4 if mine else 3,
            )
    _finish(axes, found, "ms (median)")
    handles = [pyplot.Line2D([], [], marker="D", linestyle="", color=OURS, label="rlhf_fast")]
    handles += [
        pyplot.Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in colours.items()
    ]
    if any(c.floor_ms and not c.is_call_bound for c in found):
        handles.append(
            pyplot.Line2D([], [], marker="|", linestyle="", color=LIMIT, label="machine's limit")
        )
    axes.legend(
        handles=handles, fontsize=7, frameon=False, ncol=4, loc="upper center",
        bbox_to_anchor=(0.35, -0.55 / (1.0 + 0.3 * len(found)) - 0.02),
    )  # fmt: skip
    figure.suptitle(f"{section}, {device}", fontsize=9)
    figure.tight_layout()
    return figure


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
    return f"{contest.stem}: {kind}{f', {dtype}' if dtype else ''}"


def _peaks(contest: Contest) -> tuple[float, float] | None:
    ours, rival = (contest.peaks.get(row["contestant"]) for row in (contest.ours, contest.rival))
    return (ours[0], rival[0]) if ours and rival else None
