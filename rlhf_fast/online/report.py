"""The run report: one HTML file that says what a run achieved, what it cost and what it changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_fast.io import write_file_atomic
from rlhf_fast.online.report_charts import draw_changes, draw_charts, draw_other, save_charts
from rlhf_fast.online.report_data import EvaluatedPrompt, Row, Run, is_finite, is_number, read_run
from rlhf_fast.online.report_format import duration, nats, number, signed
from rlhf_fast.online.report_metrics import EVALUATION, TABLES, TIME, Metric

NUM_SAMPLES = 9
LONG_TEXT = 700


@dataclass(frozen=True)
class Sample:
    """One held-out prompt under the first and the last policy."""

    rank: str
    before: EvaluatedPrompt
    after: EvaluatedPrompt
    change: float | None


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run folder, finished or not, and returns its path.

    The file stands alone: styles and curves are inline and nothing is fetched. The same folder
    always gives the same bytes, and a reader never sees half a file. The curves are there as
    `figures/*.png` too.

    Raises:
        UserError: the folder, its metrics.jsonl or a line of its records cannot be used.
    """
    run = read_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, duration=duration)
    html = environment.get_template("report.html.j2").render(_context(run)).lstrip()
    # A tokenizer may cut a character in two: lone surrogates become question marks.
    path = Path(run_dir) / "report.html"
    write_file_atomic(path, lambda partial: partial.write_bytes(html.encode("utf-8", "replace")))
    save_charts(run, lambda name, write: write_file_atomic(path.parent / "figures" / name, write))
    return path


def _context(run: Run) -> dict[str, Any]:
    samples, changes = _samples(run)
    tables = [t for title, metrics in TABLES.items() if (t := _table(run, title, metrics))]
    return {
        "run": run,
        "outcome": outcome(run),
        "state": _state(run),
        "warnings": _warnings(run),
        "tiles": _tiles(run),
        "tables": tables,
        "charts": draw_charts(run),
        "other_charts": draw_other(run),
        "svg": Markup,  # Drawn by us; everything else in the page is escaped.
        "samples": samples,
        "changes": changes,
        "changes_svg": draw_changes(changes, run.score_name) if len(changes) > 1 else "",
        "responses_each": max((len(s.before.responses) for s in samples), default=1),
        "stages": _stages(run),
        "long_text": LONG_TEXT,
    }


def outcome(run: Run) -> str:
    """What the run achieved, in one sentence with its numbers."""
    if not run.rows:
        return "Nothing has been evaluated yet."
    last = run.rows[-1]
    at, values = run.series(run.score_name)
    key = "gold reward" if run.score_name == "gold" else "reward"
    if last["iteration"] == 0:
        start = f": {key} {number(values[-1])}" if values else ""
        return f"Only the model at the start has been evaluated so far{start}."
    parts = []
    if is_finite(last.get("win_rate")):
        parts.append(
            f"the policy wins {_win(last)} of {_held_out(run)} against its start{_clearly(last)}"
        )
    if len(values) > 1:
        parts.append(f"{key} {number(values[0])} → {number(values[-1])}")
        best = values.index(max(values))
        if values[best] - values[-1] > 0.02 * (max(values) - min(values)):
            parts[-1] += f" (best {number(values[best])} after iteration {at[best]})"
    if is_finite(last.get("kl")):
        parts.append(f"KL {nats(last['kl'])} nats")
    plural = "" if last["iteration"] == 1 else "s"
    lead = f"After {last['iteration']} iteration{plural} "
    return lead + ("; ".join(parts) or "nothing was measured") + "."


def _win(row: Row) -> str:
    error, rate = row.get("win_rate_stderr"), row["win_rate"]
    text = f"{100 * rate:.0f} %"
    return f"{text} ± {100 * error:.0f}" if is_finite(error) else text


def _clearly(row: Row) -> str:
    error = row.get("win_rate_stderr")
    is_near = is_finite(error) and abs(row["win_rate"] - 0.5) < 2 * error
    return ", no clear difference" if is_near else ""


def _held_out(run: Run) -> str:
    last = max(run.evaluations, default=None)
    known = last == run.rows[-1]["iteration"] and len(run.evaluations[last])
    return f"{known} held-out prompts" if known else "held-out prompts"


def _state(run: Run) -> str:
    done = run.rows[-1]["iteration"] if run.rows else 0
    planned = run.planned_iterations
    if planned is None:
        return f"{done} iterations evaluated" if done != 1 else "1 iteration evaluated"
    word = "finished" if done >= planned else "unfinished"
    return f"{word}: {done} of {planned} iterations evaluated"


def _warnings(run: Run) -> list[tuple[str, str]]:
    found = []
    for row in run.rows:
        texts = row.get("warnings") or []
        texts = texts if isinstance(texts, list) else [texts]
        name = "start" if row["iteration"] == 0 else f"iteration {row['iteration']}"
        found += [(name, str(text)) for text in texts]
    for stage, rows in run.training.items():
        broken = sum(is_number(r.get("loss")) and not is_finite(r["loss"]) for r in rows)
        if broken:
            name = "SFT" if stage == "sft" else stage.replace("_", " ")
            found.append((name, f"the loss is not finite in {broken} of {len(rows)} steps"))
    return found


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the last iteration's key numbers."""
    tiles = []
    for metric in EVALUATION:
        _, values = run.series(metric.key)
        if not values:
            continue
        text = number(values[-1], metric.form)
        remark = f"from {number(values[0], metric.form)}" if len(values) > 1 else ""
        if metric.key == "win_rate":
            row = [r for r in run.rows if is_finite(r.get("win_rate"))][-1]
            error = row.get("win_rate_stderr")
            remark = f"± {100 * error:.1f} vs start" if is_finite(error) else "vs start"
        if metric.key == "kl":
            text, remark = nats(values[-1]), "nats per response"
        tiles.append((metric.label, text, remark))
    if seconds := _total_seconds(run):
        size, unit = next(u for u in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= u[0])
        tiles.append(("time", f"{seconds / (size or 1):.1f} {unit}", "all recorded stages"))
    return tiles


def _total_seconds(run: Run) -> float:
    if stages := _stages(run):
        return sum(s["seconds"] for s in stages)
    keys = [m.key for m in TIME if m.form == "seconds"]
    return sum(sum(run.series(key)[1]) for key in keys)


def _stages(run: Run) -> list[Row]:
    """The manifest's stages, each with its share of the longest one for a bar."""
    listed = run.manifest.get("stages")
    stages = [s for s in listed if isinstance(s, dict)] if isinstance(listed, list) else []
    stages = [s for s in stages if is_finite(s.get("seconds")) and s.get("name")]
    longest = max((s["seconds"] for s in stages), default=0) or 1
    return [
        {
            "name": s["name"],
            "seconds": s["seconds"],
            "finished": str(s.get("finished") or "").replace("T", " ").removesuffix("+00:00"),
            "bar": f"{100 * s['seconds'] / longest:.1f}",
        }
        for s in stages
    ]


def _table(run: Run, title: str, metrics: list[Metric]) -> Row | None:
    """One line per iteration; columns nobody measured are left out."""
    metrics = [m for m in metrics if any(is_number(r.get(m.key)) for r in run.rows)]
    if not metrics:
        return None
    columns = [_column(run, metric) for metric in metrics]
    return {
        "title": title,
        "metrics": metrics,
        "lines": [
            (row["iteration"], [column[i] for column in columns])
            for i, row in enumerate(run.rows)
            if any(is_number(row.get(m.key)) for m in metrics)
        ],
    }


def _column(run: Run, metric: Metric) -> list[tuple[str, bool]]:
    """(text, is the best one) per row, all with the decimals the largest value asks for."""
    values = [row.get(metric.key) for row in run.rows]
    largest = max((abs(v) for v in values if is_finite(v)), default=0.0)
    texts = [number(v, metric.form, largest, metric.digits) for v in values]
    if metric.key == "win_rate":
        errors = [row.get("win_rate_stderr") for row in run.rows]
        texts = [f"{t} ± {100 * e:.1f}" if is_finite(e) else t for t, e in zip(texts, errors)]
    _, finite = run.series(metric.key)
    best = max(finite) if metric.key in ("win_rate", "gold") and len(finite) > 1 else None
    return [(text, best is not None and value == best) for text, value in zip(texts, values)]


def _samples(run: Run) -> tuple[list[Sample], list[float]]:
    """Prompts spread evenly from the best to the worst change, and all changes in that order."""
    if len(run.evaluations) < 2:
        return [], []
    first, last = min(run.evaluations), max(run.evaluations)
    after = {p.id: p for p in run.evaluations[last]}
    pairs = [(p, after[p.id]) for p in run.evaluations[first] if p.id in after]
    scored = [
        (a.mean_reward - b.mean_reward, b, a)
        for b, a in pairs
        if None not in (b.mean_reward, a.mean_reward)
    ]
    if not scored:
        return [Sample("", b, a, None) for b, a in pairs[:NUM_SAMPLES]], []
    scored.sort(key=lambda item: -item[0])
    last_rank = len(scored) - 1
    shown = min(NUM_SAMPLES, len(scored))
    ranks = sorted({round(i * last_rank / max(1, shown - 1)) for i in range(shown)})
    names = {ranks[len(ranks) // 2]: "median", 0: "best change", last_rank: "worst change"}
    names = names if len(scored) > 1 else {}
    samples = []
    for rank in ranks:
        change, before, final = scored[rank]
        name = names.get(rank, f"rank {rank + 1} of {len(scored)}")
        samples.append(Sample(name, before, final, change))
    return samples, [change for change, _, _ in scored]
