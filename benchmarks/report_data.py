"""What was measured on a machine, read back from its CSV as contests: ours against the rest."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

OURS = "rlhf_fast"
LIMITS = ("products alone", "one pass")
"""Contestants that no implementation can beat."""
CALL_BOUND_MS = 0.01
"""Where the work itself takes less than this, what is measured is the call."""
TIE = 1.1
"""A ratio of times within this factor of 1, either way, is no difference."""

SECTIONS = {
    "Whole iterations and training steps": ("online", "training", "integrations"),
    "Output head, hidden states to loss": (
        "linear_logps",
        "linear_policy_loss",
        "linear_preference_loss",
    ),
    "From logits": ("logps", "kl"),
    "Losses": (
        "policy_loss",
        "value_loss",
        "preference_loss",
        "list_loss",
        "reward_model_loss",
    ),
    "Advantages and sums": ("gae", "group_advantages", "whiten", "segment_sum"),
}
OTHER = "Other"

Row = dict[str, str]
Case = tuple[str, ...]


def load(path: Path) -> list[Row]:
    """The rows of the newest run of every case.

    Contestants took turns in a run only, so a case is never put together from several. A run with
    ours and others goes before one without, however new. Lines need not be in order of time.
    """
    runs: dict[Case, dict[tuple[str, str], dict[str, Row]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            run = runs.setdefault(case_of(row), {}).setdefault((row["date"], row["commit"]), {})
            run[row["contestant"]] = row
    return [row for case in runs.values() for row in _newest(case).values()]


def _newest(runs: dict[tuple[str, str], dict[str, Row]]) -> dict[str, Row]:
    def rank(item: tuple[int, tuple[str, str]]) -> tuple[bool, str, int]:
        place, key = item
        return is_contest(runs[key].values()), key[0], place

    return runs[max(enumerate(runs), key=rank)[1]]


def is_contest(rows: Iterable[Row]) -> bool:
    """Whether both ours and others take part."""
    rows = list(rows)
    return any(map(is_ours, rows)) and any(map(is_rival, rows))


def case_of(row: Row) -> Case:
    """What contestants must share to be compared."""
    return tuple(row[n] for n in ("stem", "kind", "dtype", "shape", "threads", "malloc"))


def section_of(stem: str) -> str:
    return next((name for name, stems in SECTIONS.items() if stem in stems), OTHER)


def median(row: Row) -> float:
    return float(row["median_ms"])


def is_ours(row: Row) -> bool:
    return row["contestant"].startswith(OURS)


def is_limit(row: Row) -> bool:
    return row["contestant"].startswith(LIMITS)


def memory(row: Row) -> tuple[float, str] | None:
    """(peak, its unit), where it was measured."""
    for part in row["details"].split():
        name, _, value = part.partition("=")
        if name in ("peak_bytes", "peak_extra_per_logits") and value not in ("nan", "0", ""):
            return (float(value) / 2**20, "MiB") if name == "peak_bytes" else (float(value), "x")
    return None


@dataclass
class Contest:
    """One case: the times of everyone in it."""

    case: Case
    rows: list[Row]
    peaks: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Peak memory by contestant: of this case, or of the same one under default malloc, which
    alone shows what is freed."""

    @property
    def stem(self) -> str:
        return self.case[0]

    @property
    def ours(self) -> Row:
        return min(filter(is_ours, self.rows), key=median)

    @property
    def rival(self) -> Row:
        return min(filter(is_rival, self.rows), key=median)

    @property
    def is_decided(self) -> bool:
        return is_contest(self.rows)

    @property
    def gain(self) -> float:
        """How many times faster we are than the fastest other."""
        return median(self.rival) / median(self.ours)

    @property
    def verdict(self) -> str:
        return "win" if self.gain > TIE else "loss" if self.gain < 1 / TIE else "tie"

    @property
    def floor_ms(self) -> float | None:
        found = self.rows[0]["floor_ms"]
        return float(found) if found else None

    @property
    def is_call_bound(self) -> bool:
        return self.floor_ms is not None and self.floor_ms < CALL_BOUND_MS

    @property
    def share_of_limit(self) -> float | None:
        """The machine's least time for this work, as a share of ours."""
        return None if self.floor_ms is None else self.floor_ms / median(self.ours)

    @property
    def size(self) -> int:
        size = 1
        for part in self.case[3].split():
            value = part.split("=")[1]
            size *= int(value) if value.isdigit() else 1
        return size

    @property
    def name(self) -> str:
        return ", ".join(part for part in self.case[:2] if part)

    @property
    def sizes(self) -> str:
        """dtype, shape and threads, short."""
        _, _, dtype, shape, threads, _ = self.case
        dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
        for long, short in (("tokens=", "N="), ("vocab=", "V="), ("width=", "D=")):
            shape = shape.replace(long, short)
        shape = re.sub(r"batch=(\d+) length=(\d+)", r"\1 x \2", shape)
        shape = re.sub(r"lengths=(\S+) pairs=(\d+)", r"\2 pairs of \1,", shape)
        shape = re.sub(r"model=(\S+?)(-[0-9a-f]{12})?$", r"\1", shape)  # without a content's hash
        parts = [dtype, shape, f"{threads} threads" if int(threads) > 1 else ""]
        return ", ".join(part for part in parts if part)


def is_rival(row: Row) -> bool:
    return not is_ours(row) and not is_limit(row)


def contests(rows: Iterable[Row]) -> list[Contest]:
    found: dict[Case, Contest] = {}
    peaks: dict[tuple[Case, str], tuple[float, str]] = {}
    for row in rows:
        case = case_of(row)
        found.setdefault(case, Contest(case, [])).rows.append(row)
        if (peak := memory(row)) is not None:
            peaks[case[:4], row["contestant"]] = peak
    for contest in found.values():
        names = [row["contestant"] for row in contest.rows]
        keys = {name: (contest.case[:4], name) for name in names}
        contest.peaks = {name: peaks[key] for name, key in keys.items() if key in peaks}
    return list(found.values())


def headlines(rows: list[Row]) -> list[Contest]:
    """Of every op and kind the hardest contest: tuned malloc, most threads, largest shape, bf16.

    Ordered by section, then as measured.
    """
    decided = [c for c in contests(rows) if c.is_decided]
    tuned = {c.stem for c in decided if c.case[5] == "tuned"}

    def rank(contest: Contest) -> tuple[bool, int, int]:
        return contest.case[2] in ("bfloat16", ""), int(contest.case[4]), contest.size

    best: dict[tuple[str, str], Contest] = {}
    for contest in decided:
        held = best.get(contest.case[:2])
        is_hard = contest.case[5] == "tuned" or contest.stem not in tuned
        if is_hard and (held is None or rank(contest) > rank(held)):
            best[contest.case[:2]] = contest
    stems = [stem for stems in SECTIONS.values() for stem in stems]
    place = {stem: number for number, stem in enumerate(stems)}
    return sorted(best.values(), key=lambda c: place.get(c.stem, len(place)))


MOST_USED = ("SFT", "DPO", "GRPO", "OpenRLHF PPO", "verl PPO fused", "LLaMA-Factory DPO LoRA")
"""Of the patched trainers; docs/integrations.md has all."""


def highlights(found: list[Contest]) -> list[Contest]:
    """What a newcomer reads: of an op the kind with the most work, of whole steps every kind, of
    other frameworks' trainers the most used."""
    found = [c for c in found if c.stem != "integrations" or c.case[1] in MOST_USED]
    steps = next(iter(SECTIONS.values()))
    most: dict[str, Contest] = {}
    for contest in found:
        held = most.get(contest.stem)
        if held is None or median(contest.ours) > median(held.ours):
            most[contest.stem] = contest
    return [c for c in found if not c.is_call_bound and (c.stem in steps or c is most[c.stem])]


def tally(found: Iterable[Contest]) -> Counter[str]:
    return Counter(contest.verdict for contest in found)
