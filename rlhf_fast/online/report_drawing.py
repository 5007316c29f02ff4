"""How the report draws: colours that follow the page's theme, panels, curves, inline SVG."""

from __future__ import annotations

import contextlib
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import get_named_colors_mapping
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from rlhf_fast.online.report_data import Run, is_finite

# name: (variable of the page, so that dark pages recolour the curves; colour of a PNG)
PALETTE = {
    "ink": ("--ink", "#1b2130"),
    "muted": ("--muted", "#626b7c"),
    "grid": ("--grid", "#dfe3ea"),
    "blue": ("--blue", "#2563d9"),
    "orange": ("--orange", "#d0660b"),
    "teal": ("--teal", "#0b8577"),
    "purple": ("--purple", "#7b4fd6"),
    "green": ("--good", "#15803d"),
    "red": ("--bad", "#c8321f"),
}
INK, MUTED, GRID, BLUE, ORANGE, TEAL, PURPLE, GREEN, RED = (f"report {name}" for name in PALETTE)
FOR_PNG = [color for _, color in PALETTE.values()]
FOR_PAGE = [f"#0a0a{k:02x}" for k in range(1, 1 + len(PALETTE))]
"""Placeholders, each replaced by a CSS variable."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_fast",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 10,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.ymargin": 0.12,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
NARROW, WIDE = 5.9, 12.1


@contextlib.contextmanager
def style(colors: Sequence[str]) -> Iterator[None]:
    """The report's style, its colours having these values until the end."""
    known = get_named_colors_mapping()
    names = [f"report {name}" for name in PALETTE]
    for name, color in zip(names, colors):
        known[name] = color
    try:
        with rc_context(STYLE):
            yield
    finally:
        for name in names:
            del known[name]


def make_panels(
    count: int, *, width: float = NARROW, height: float, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    rows = -(-count // columns)
    panels = figure.subplots(rows, columns, sharex=rows > 1, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def draw_curve(axes: Axes, run: Run, key: str, color: str, form: str, label: str = "") -> bool:
    xs, ys = run.series(key)
    if xs:
        axes.plot(xs, ys, form, color=color, label=label or None)
    return bool(xs)


def iteration_axis(axes: Axes) -> None:
    axes.set_xlabel("iteration (0 is the start)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def stage_bands(axes: Axes, stages: list[tuple[str, int]]) -> None:
    """Shades every second stage and names each, where there is room for the names."""
    across = blended_transform_factory(axes.transData, axes.transAxes)
    start = 0.5
    for index, (name, length) in enumerate(stages):
        if index % 2:
            axes.axvspan(start, start + length, color=GRID, alpha=0.35, linewidth=0)
        if len(stages) <= 6:
            middle = start + length / 2
            axes.text(middle, 1, name, transform=across, ha="center", va="top", color=MUTED, size=9)
        start += length
    axes.set_xlim(0.5, start)
    axes.margins(y=0.2)


def draw_steps(axes: Axes, values: list[object], color: str, start: int = 0) -> None:
    """Every step thinly, and the running mean over about a twentieth; a lone step as a dot."""
    ys = np.array([v if is_finite(v) else np.nan for v in values], dtype=float)
    size = max(1, len(ys) // 500)
    means = np.array([_mean(ys[i : i + size]) for i in range(0, len(ys), size)])
    xs = start + 1 + np.arange(len(means)) * size
    half = max(1, len(means) // 40)
    smooth = [_mean(means[max(0, i - half) : i + half + 1]) for i in range(len(means))]
    axes.plot(xs, means, color=color, linewidth=1, alpha=0.35)
    axes.plot(xs, smooth, color=color, marker="o" if len(smooth) == 1 else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def draw_svg(figure: Figure, label: str) -> str:
    """Inline SVG: no prolog, no metadata, ids of its own, colours and font of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()) + f"-{zlib.crc32(svg.encode()):x}"
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for color, (variable, _) in zip(FOR_PAGE, PALETTE.values()):
        svg = svg.replace(color, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg).group()
    spoken = re.sub(r"[^\w .()-]", "", label)
    head = f'<svg {box} role="img" aria-label="{spoken}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
