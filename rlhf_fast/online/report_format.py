"""Numbers as the report prints them."""

from __future__ import annotations

from typing import Any

from rlhf_fast.online.report_data import is_finite, is_number


def number(
    value: Any, form: str = "number", largest: float | None = None, extra_digits: int = 0
) -> str:
    """A number for reading: decimals by the size of the largest in its column; a dash for none."""
    if not is_number(value):
        return "–"
    if not is_finite(value):
        return "NaN" if value != value else "−∞" if value < 0 else "∞"
    if form == "share":
        return f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"
    size = abs(value) if largest is None else largest
    if form == "count":
        decimals = 0
    elif form == "seconds":
        decimals = 0 if size >= 1000 else 1
    elif size >= 1e6:
        return f"{value:.3g}".replace("-", "−")
    else:
        decimals = 1 if size >= 10 else 2 if size >= 0.02 or size == 0 else 4
        decimals += extra_digits
    # Adding zero turns the negative zero of a tiny negative value into a plain one.
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−")


def nats(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
