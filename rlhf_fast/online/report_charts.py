"""The report's curves: matplotlib figures as inline SVG in the page's colours, and as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from rlhf_fast.online.report_data import Run, is_finite
from rlhf_fast.online.report_drawing import (
    BLUE,
    FOR_PAGE,
    FOR_PNG,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    WIDE,
    draw_curve,
    draw_steps,
    draw_svg,
    iteration_axis,
    make_panels,
    stage_bands,
    style,
)
from rlhf_fast.online.report_metrics import TIME


@dataclass(frozen=True)
class Chart:
    """One drawn figure with the words around it."""

    title: str
    caption: str
    figure: Figure
    label: str
    """What it shows, for those who cannot see it."""
    wide: bool = False
    svg: str = ""


def draw_charts(run: Run) -> list[Chart]:
    """Every curve the run has numbers for, in reading order."""
    with style(FOR_PAGE):
        return [replace(chart, svg=draw_svg(chart.figure, chart.label)) for chart in _charts(run)]


def save_charts(run: Run, save: Callable[[str, Callable[[Path], None]], None]) -> None:
    """Hands each curve to `save` as a PNG: its file's name, and what writes it to a path."""
    with style(FOR_PNG):
        for chart in _charts(run):
            options = {"format": "png", "dpi": 120, "facecolor": "white"}
            write = partial(chart.figure.savefig, **options)
            save(f"{chart.title.lower().replace(' ', '_')}.png", write)


def _charts(run: Run) -> list[Chart]:
    drawers = [_rewards, _win_rate, _score_against_kl, _responses, _lengths]
    drawers += [_seconds, _update_steps, _sft]
    return [chart for drawer in drawers if (chart := drawer(run)) is not None]


def draw_other(run: Run) -> list[Chart]:
    """One small curve per numeric key the report has no name for."""
    charts = []
    with style(FOR_PAGE):
        for key in run.other_keys():
            figure, (axes,) = make_panels(1, height=2.2)
            if draw_curve(axes, run, key, BLUE, "o-"):
                iteration_axis(axes)
                last = f"Last value {run.series(key)[1][-1]:.4g}."
                label = f"other {key}"
                charts.append(Chart(key, last, figure, label, svg=draw_svg(figure, label)))
    return charts


def draw_changes(changes: list[float], name: str) -> str:
    """One bar per held-out prompt, sorted: its change from the first policy to the last."""
    with style(FOR_PAGE):
        figure, (axes,) = make_panels(1, width=WIDE, height=2.1)
        colors = [GREEN if c > 0 else RED for c in changes]
        axes.bar(range(len(changes)), changes, color=colors, width=0.8)
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_ylabel(f"change of the {name} score")
        axes.set_xlim(-0.8, len(changes) - 0.2)
        return draw_svg(figure, f"change of the {name} score per held-out prompt, sorted")


def _rewards(run: Run) -> Chart | None:
    keys = [k for k in ("gold", "reward") if run.series(k)[0]]
    trains = bool(run.series("train_reward")[0])
    if not keys and not trains:
        return None
    names = {"gold": "gold (held-out judge)", "reward": "reward (what training optimises)"}
    drawn = keys if "reward" in keys or not trains else [*keys, "reward"]
    figure, panels = make_panels(len(drawn), height=3.6)
    for axes, key in zip(panels, drawn):
        axes.set_title(names[key])
        draw_curve(axes, run, key, ORANGE if key == "gold" else BLUE, "o-", "held-out prompts")
        if key == "reward" and draw_curve(
            axes, run, "train_reward", PURPLE, "s--", "training samples"
        ):
            axes.legend(loc="best")
    iteration_axis(panels[-1])
    caption = "Reward that rises while gold falls is over-optimisation of the reward model."
    return Chart("Reward", caption, figure, "gold and reward by iteration")


def _win_rate(run: Run) -> Chart | None:
    rows = [r for r in run.rows if is_finite(r.get("win_rate"))]
    if not rows:
        return None
    errors = [r.get("win_rate_stderr") for r in rows]
    errors = [abs(e) if is_finite(e) else 0.0 for e in errors]
    figure, (axes,) = make_panels(1, height=3.6)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    # Anchored in axes units: the line's label must stay inside whatever the iterations are.
    across = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(0.995, 0.51, "tie", transform=across, ha="right", va="bottom", color=MUTED)
    xs, ys = [r["iteration"] for r in rows], [r["win_rate"] for r in rows]
    axes.errorbar(xs, ys, yerr=errors, fmt="o-", color=TEAL, capsize=4, elinewidth=1.3)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_ylim(min(0.3, min(ys) - 0.1), 1.03)
    iteration_axis(axes)
    caption = "Share of held-out prompts won against the start; bars are one standard error."
    return Chart("Win rate", caption, figure, "win rate by iteration")


def _score_against_kl(run: Run) -> Chart | None:
    rows = [r for r in run.rows if is_finite(r.get("kl"))]
    key = run.score_name
    rows = [r for r in rows if is_finite(r.get(key))]
    if not rows:
        return None
    # A sampled KL may be slightly negative where the policies agree.
    xs, ys = [math.sqrt(max(r["kl"], 0.0)) for r in rows], [r[key] for r in rows]
    figure, (axes,) = make_panels(1, height=3.6)
    axes.plot(xs, ys, "o-", color=ORANGE if key == "gold" else BLUE)
    for row, x, y in zip(rows, xs, ys):
        name = "start" if row["iteration"] == 0 else str(row["iteration"])
        axes.annotate(name, (x, y), (0, 8), textcoords="offset points", ha="center", color=INK)
    axes.margins(x=0.08, y=0.18)
    axes.set_xlabel("√KL (nats per response)")
    axes.set_ylabel(key)
    caption = "What the distance from the reference buys; a bend down is the sign to stop."
    title = "Gold against distance" if key == "gold" else "Reward against distance"
    return Chart(title, caption, figure, f"{key} against the root of KL")


def _responses(run: Run) -> Chart | None:
    has_length = bool(run.series("length_tokens")[0])
    shares = [k for k in ("finished_share", "distinct_2") if run.series(k)[0]]
    if not has_length and not shares:
        return None
    figure, panels = make_panels(has_length + bool(shares), height=3.6)
    if has_length:
        panels[0].set_title("length (tokens)")
        draw_curve(panels[0], run, "length_tokens", PURPLE, "o-")
        panels[0].set_ylim(0, 1.2 * max(1.0, *run.series("length_tokens")[1]))
    if shares:
        axes = panels[-1]
        axes.set_title("shares")
        draw_curve(axes, run, "finished_share", TEAL, "o-", "finished by itself")
        draw_curve(axes, run, "distinct_2", ORANGE, "s--", "distinct bigrams")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_ylim(0, 1.08)
        axes.legend(loc="lower left")
    iteration_axis(panels[-1])
    caption = "A policy that cheats its reward often grows longer, stops ending, or repeats itself."
    return Chart("Responses", caption, figure, "length and finished share by iteration")


def _lengths(run: Run) -> Chart | None:
    """Lengths of the held-out responses of the first and the last policy."""
    found = {
        iteration: [r.num_tokens for p in prompts for r in p.responses if r.num_tokens]
        for iteration, prompts in run.evaluations.items()
    }
    found = {iteration: lengths for iteration, lengths in found.items() if lengths}
    if not found:
        return None
    longest = max(map(max, found.values()))
    # At most 24 bars, and whole tokens to a bar.
    edges = np.arange(0.5, longest + 1 + (width := -(-longest // 24)), width)
    figure, panels = make_panels(len(found), height=3.6)
    for axes, (iteration, lengths), color in zip(panels, found.items(), (MUTED, PURPLE)):
        name = "start" if iteration == 0 else f"iteration {iteration}"
        axes.set_title(f"{name}, {len(lengths)} responses")
        axes.hist(lengths, edges, color=color, rwidth=0.9)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[-1].set_xlabel("length (tokens)")
    caption = "A heap at the right end is the token limit, which cuts what does not end by itself."
    return Chart("Lengths", caption, figure, "histogram of lengths, first and last")


def _update_steps(run: Run) -> Chart | None:
    stages = {s: rows for s, rows in run.training.items() if s != "sft"}
    names = {
        "loss": ("loss", BLUE),
        "reward_accuracy": ("accuracy of the implicit reward", TEAL),
        "reward_margin": ("margin of the implicit reward", PURPLE),
        "policy_entropy": ("entropy of the policy (nats per token)", TEAL),
        "old_kl_k3": ("KL of the update so far (nats per token)", PURPLE),
        "value_loss": ("loss of the critic", BLUE),
        "grad_norm": ("gradient norm", ORANGE),
    }
    steps = [row for rows in stages.values() for row in rows]
    keys = [k for k in names if any(is_finite(row.get(k)) for row in steps)]
    if not keys:
        return None
    columns = min(2, len(keys))
    height = 0.6 + 2.0 * -(-len(keys) // columns)
    figure, panels = make_panels(len(keys), width=WIDE, height=height, columns=columns)
    for axes, key in zip(panels, keys):
        axes.set_title(names[key][0])
        stage_bands(axes, [(s.replace("_", " "), len(rows)) for s, rows in stages.items()])
        start = 0
        for rows in stages.values():
            draw_steps(axes, [row.get(key) for row in rows], names[key][1], start)
            start += len(rows)
    for axes in panels[-columns:]:
        axes.set_xlabel("optimiser step, all iterations in a row")
    caption = "Faint: every step; strong: running mean."
    return Chart("Training steps", caption, figure, "training curves by step", wide=True)


def _sft(run: Run) -> Chart | None:
    losses = [row.get("loss") for row in run.training.get("sft", [])]
    if not any(map(is_finite, losses)):
        return None
    figure, (axes,) = make_panels(1, height=3.0)
    draw_steps(axes, losses, BLUE)
    axes.set_xlabel("optimiser step")
    return Chart("Supervised fine-tuning", "Loss by step.", figure, "SFT loss by step")


def _seconds(run: Run) -> Chart | None:
    stages = [m for m in TIME if m.form == "seconds" and run.series(m.key)[0]]
    if not stages:
        return None
    names = ["start" if r["iteration"] == 0 else f"iteration {r['iteration']}" for r in run.rows]
    figure, (axes,) = make_panels(1, height=max(3.0, 1.2 + 0.34 * len(names)))
    left = np.zeros(len(names))
    for metric, color in zip(stages, (BLUE, TEAL, ORANGE, PURPLE)):
        found = [r.get(metric.key) for r in run.rows]
        widths = np.array([s if is_finite(s) else 0.0 for s in found])
        axes.barh(names, widths, left=left, color=color, height=0.6, label=metric.label)
        left += widths
    for y, total in enumerate(left):
        axes.annotate(
            f"{total:,.0f} s" if total >= 10 else f"{total:.1f} s",
            (total, y),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
    axes.set_xlabel("seconds")
    return Chart("Time", "Where each iteration spends it.", figure, "seconds by stage")
