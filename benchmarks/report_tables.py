"""Markdown of what was measured: the README's table, and the page of one machine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from benchmarks import report_data
from benchmarks.harness import RESULTS
from benchmarks.report_data import Contest, Row, is_limit, median, section_of

MARKS = {"win": "", "tie": " (tie)", "loss": " (slower)"}


def headline(rows: list[Row]) -> str:
    """The contests that a newcomer should see, by section, and the tally of all."""
    found = report_data.headlines(rows)
    lines = [
        "| | ours, ms | fastest other, ms | faster | memory | of limit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for section, shown in by_section(report_data.highlights(found)):
        sizes = {c.sizes for c in shown}
        common = f" ({sizes.pop()})" if len(sizes) == 1 else ""
        lines.append(f"| **{section}**{common} | | | | | |")
        lines += [_headline_row(c, is_sized=not common) for c in shown]
    lines += [
        "",
        '"Memory": peak of ours / theirs, where measured. "Of limit": the least time that the '
        "machine needs for the bytes, exponentials and matrix products, as a share of ours; above "
        "100% where caches spare it bytes.",
        "",
        tally(found),
    ]
    return "\n".join(lines)


def by_section(found: list[Contest]) -> Iterator[tuple[str, list[Contest]]]:
    """Sections that are not empty; `found` is ordered by them."""
    for section, members in itertools.groupby(found, key=lambda c: section_of(c.stem)):
        yield section, list(members)


def tally(found: list[Contest]) -> str:
    """How many contests were won, tied and lost; the lost ones by name."""
    count = report_data.tally(found)
    text = f"Of {len(found)} contests {count['win']} won, {count['tie']} tied (within 10 %), "
    losses = "; ".join(f"{c.name} {_loss(c)}" for c in found if c.verdict == "loss")
    return f"{text}{count['loss']} lost{': ' + losses if losses else ''}."


def _loss(contest: Contest) -> str:
    to = f"to {contest.rival['contestant']} by {1 / contest.gain:.2g}x"
    return f"({contest.sizes}) {to}{', bound by the call' if contest.is_call_bound else ''}"


def _headline_row(contest: Contest, *, is_sized: bool) -> str:
    ours, rival = contest.ours, contest.rival
    variant = ours["contestant"].removeprefix(report_data.OURS).strip(", ")
    share = contest.share_of_limit
    title = f"{contest.name}: {contest.sizes}" if is_sized else contest.name
    return (
        f"| {title} | {_ms(median(ours))}{f' ({variant})' if variant else ''} "
        f"| {_ms(median(rival))} ({rival['contestant']}) | **{_gain(contest)}** "
        f"| {_memory(contest)} | {'' if share is None else f'{share:.0%}'} |"
    )


def balance(rows: list[Row]) -> str:
    """How all contests of every benchmark ended, at any size and setting; every loss by name."""
    found = [c for c in report_data.contests(rows) if c.is_decided]
    found.sort(key=lambda c: order(c.stem))
    lines = [
        "| | won | tied | lost | times as fast: least / median / most | of limit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for section, members in by_section(found):
        lines.append(f"| **{section}** | | | | | |")
        for stem in dict.fromkeys(c.stem for c in members):
            lines.append(_balance_row(stem, [c for c in members if c.stem == stem]))
    lines.append(_balance_row("**all**", found))
    lost: dict[str, list[str]] = {}
    for contest in (c for c in found if c.verdict == "loss"):
        how = f"{contest.sizes}, {contest.case[5]} malloc"
        to = f"{1 / contest.gain:.2g}x to {contest.rival['contestant']}"
        lost.setdefault(contest.name, []).append(f"{to} ({how})")
    lines += ["", "Lost:", ""] if lost else []
    lines += [f"* {name}: {'; '.join(cases)}" for name, cases in lost.items()]
    return "\n".join(lines)


def _balance_row(name: str, found: list[Contest]) -> str:
    count, gains = report_data.tally(found), sorted(c.gain for c in found)
    shares = sorted(c.share_of_limit for c in found if c.share_of_limit and not c.is_call_bound)
    limit = f"{statistics.median(shares):.0%}" if shares else ""
    spread = " / ".join(f"{x:.2g}" for x in (gains[0], statistics.median(gains), gains[-1]))
    counts = " | ".join(str(count[verdict]) for verdict in ("win", "tie", "loss"))
    return f"| {name} | {counts} | {spread} | {limit} |"


def integrations(rows: list[Row]) -> str:
    """Steps of other frameworks' trainers before and after patching, by model and sizes."""
    found = [c for c in report_data.contests(rows) if c.is_decided]
    tuned = {c.case[:5]: c for c in found if c.case[5] == "tuned"}
    plain = [c for c in found if c.case[5] != "tuned"]
    lines = []
    for sizes in dict.fromkeys(c.sizes for c in plain):
        lines += [
            f"| {sizes} | before, ms | after | | with tuned malloc | peak before, MiB | after |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for contest in (c for c in plain if c.sizes == sizes):
            ours, theirs = contest.ours, contest.rival
            peaks = (contest.peaks.get(row["contestant"]) for row in (theirs, ours))
            cells = [contest.case[1], _ms(median(theirs)), _ms(median(ours)), _gain(contest)]
            cells.append(_gain(tuned[contest.case[:5]]) if contest.case[:5] in tuned else "")
            cells += ["" if peak is None else _peak(peak) for peak in peaks]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines[:-1])


def order(stem: str) -> tuple[int, str]:
    """Of benchmarks on a page."""
    stems = [stem for stems in report_data.SECTIONS.values() for stem in stems]
    return (stems.index(stem) if stem in stems else len(stems)), stem


def provenance(device: str, rows: list[Row]) -> str:
    """On what, when and with which versions this was measured."""
    newest = max(rows, key=lambda r: r["date"])
    days = sorted({row["date"][:10] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    at = f"revision {commits[0]}" if len(commits) == 1 else f"{len(commits)} revisions"
    device = newest.get("device") or device.replace("_", " ")
    return f"{device}, Python {newest['python']}, torch {newest['torch']}, {when}, {at}"


def _gain(contest: Contest) -> str:
    gain = contest.gain
    shown = f"{gain:.2f}" if gain < 2 else f"{gain:.1f}" if gain < 10 else f"{gain:.0f}"
    return f"{shown}x{MARKS[contest.verdict]}"


def _memory(contest: Contest) -> str:
    ours, rival = (contest.peaks.get(row["contestant"]) for row in (contest.ours, contest.rival))
    if not (ours and rival):
        return ""
    unit = "MiB" if ours[1] == "MiB" else "of logits"
    return " / ".join(_peak(peak) for peak in (ours, rival)) + f" {unit}"


def _peak(peak: tuple[float, str]) -> str:
    value, unit = peak
    return f"{value:.0f}" if unit == "MiB" else f"{value:.2g}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def page(device: str, rows: list[Row], plots: list[str]) -> str:
    """Everything that was measured on a machine."""
    found = [c for c in report_data.contests(rows) if len(c.rows) > 1]
    lines = [
        f"# {device.replace('_', ' ')}",
        "",
        f"{provenance(device, rows)}.",
        "",
        headline(rows),
        "",
    ]
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
    for stem in sorted({c.stem for c in found}, key=order):
        members = [c for c in found if c.stem == stem]
        lines += [f"## {stem}", "", *_table(members), ""]
        runs = {
            f"    {r['command']}  # {r['date']}, {r['commit']}, load {r['load']}": None
            for c in members
            for r in c.rows
        }
        lines += [*sorted(runs), ""]
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
