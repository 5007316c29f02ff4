"""Markdown of what was measured: the README's table, and the page of one machine."""

from __future__ import annotations

from collections import Counter

from benchmarks import report_data
from benchmarks.harness import RESULTS
from benchmarks.report_data import Contest, Row, is_limit, median, section_of

MARKS = {"win": "", "tie": " (tie)", "loss": " (slower)"}


def headline(rows: list[Row]) -> str:
    """A line per op and kind, sections first; calls and the tally of all below."""
    found = report_data.headlines(rows)
    shown = [c for c in found if not c.is_call_bound]
    calls = [c for c in found if c.is_call_bound]
    lines = [
        "| | ours, ms | fastest other, ms | faster | memory | of limit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    section = None
    for contest in shown:
        if section != (section := section_of(contest.stem)):
            lines.append(f"| **{section}** | | | | | |")
        lines.append(_headline_row(contest))
    lines += [
        "",
        '"Memory": peak of ours / theirs, where measured. "Of limit": the least time that the '
        "machine needs for the bytes, exponentials and matrix products, as a share of ours.",
    ]
    if calls:
        named = "; ".join(f"{c.name} {_gain(c)}" for c in sorted(calls, key=lambda c: -c.gain))
        lines.append(f"Bound by the call, as the work takes under 10 µs: {named}.")
    return "\n".join([*lines, "", tally(found)])


def tally(found: list[Contest]) -> str:
    """How many contests were won, tied and lost; the lost ones by name."""
    count = Counter(c.verdict for c in found)
    lost = "; ".join(
        f"{c.name}, to {c.rival['contestant']} ({1 / c.gain:.2g}x slower)"
        for c in found
        if c.verdict == "loss"
    )
    text = f"Of {len(found)} contests {count['win']} won, {count['tie']} tied (within 10 %), "
    return f"{text}{count['loss']} lost{': ' + lost if lost else ''}."


def _headline_row(contest: Contest) -> str:
    ours, rival = contest.ours, contest.rival
    variant = ours["contestant"].removeprefix(report_data.OURS).strip(", ")
    share = contest.share_of_limit
    return (
        f"| {contest.name}: {contest.sizes} | {_ms(median(ours))}"
        f"{f' ({variant})' if variant else ''} | {_ms(median(rival))} ({rival['contestant']}) "
        f"| **{_gain(contest)}** | {_memory(contest)} "
        f"| {'' if share is None else f'{min(share, 1.0):.0%}'} |"
    )


def _gain(contest: Contest) -> str:
    gain = contest.gain
    shown = f"{gain:.2f}" if gain < 2 else f"{gain:.1f}" if gain < 10 else f"{gain:.0f}"
    return f"{shown}x{MARKS[contest.verdict]}"


def _memory(contest: Contest) -> str:
    ours, rival = (contest.peaks.get(row["contestant"]) for row in (contest.ours, contest.rival))
    return f"{_peak(ours)} / {_peak(rival)}" if ours and rival else ""


def _peak(peak: tuple[float, str]) -> str:
    value, unit = peak
    return f"{value:.0f} {unit}" if unit == "MiB" else f"{value:.2g} of the logits"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def page(device: str, rows: list[Row], plots: list[str]) -> str:
    """Everything that was measured on a machine."""
    found = [c for c in report_data.contests(rows) if len(c.rows) > 1]
    lines = [f"# {device.replace('_', ' ')}", "", headline(rows), ""]
    lines += [
        "Below: all medians in ms, the fastest in bold, in brackets the peak memory where it was "
        'measured (MiB of the process, or as a share of the logits). "Limit" is the machine\'s '
        "least time for the work, measured in the same run. Quantiles, errors, versions and "
        f"commands of every measurement: [{device}.csv]({device}.csv).",
        "",
    ]
    lines += [f"![{name}](plots/{device}-{name}.png)\n" for name in plots]
    if grown := sorted((RESULTS / "sweeps").glob(f"*{device}*.png")):
        lines += ["## Growth", "", *(f"![{p.stem}](sweeps/{p.name})\n" for p in grown)]
    stems = list(dict.fromkeys(c.stem for c in found))
    order = {name: number for number, name in enumerate((*report_data.SECTIONS, "Other"))}
    for stem in sorted(stems, key=lambda s: order[section_of(s)]):
        lines += [f"## {stem}", "", *_table([c for c in found if c.stem == stem]), ""]
        commands = dict.fromkeys(r["command"] for c in found if c.stem == stem for r in c.rows)
        lines += [*(f"    {command}" for command in commands), ""]
    return "\n".join(lines)


def _table(found: list[Contest]) -> list[str]:
    """Cases down, contestants across."""
    names = list(dict.fromkeys(r["contestant"] for c in found for r in c.rows if not is_limit(r)))
    names.sort(key=lambda name: not name.startswith(report_data.OURS))
    lines = ["| case | threads, malloc | limit | " + " | ".join(names) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(names))
    for contest in found:
        by_name = {r["contestant"]: r for r in contest.rows if not is_limit(r)}
        best = min(map(median, by_name.values()), default=0.0)
        cells = [_cell(contest, by_name.get(name), best) for name in names]
        limit = contest.floor_ms
        limit = "" if limit is None else "call" if contest.is_call_bound else _ms(limit)
        how = f"{contest.case[4]}, {contest.case[5]}"
        lines.append(f"| {_case(contest)} | {how} | {limit} | " + " | ".join(cells) + " |")
    return lines


def _case(contest: Contest) -> str:
    return ", ".join(part for part in (contest.case[1], contest.sizes) if part)


def _cell(contest: Contest, row: Row | None, best: float) -> str:
    if row is None:
        return ""
    shown = _ms(median(row))
    shown = f"**{shown}**" if median(row) == best else shown
    peak = contest.peaks.get(row["contestant"]) if contest.case[5] == "default" else None
    return shown if peak is None else f"{shown} ({peak[0]:.3g})"
