"""How the report writes figures, dates and counts."""

from __future__ import annotations

import math
from datetime import UTC, datetime

NBSP = "\N{NO-BREAK SPACE}"
_MONTHS = "January February March April May June July August September October November December".split()


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, and thousands apart; – for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "–" if share is None else f"{100 * share:.1f}{NBSP}%"


def change(after: float | None, before: float | None) -> str:
    """The difference in percent of what was before."""
    if after is None or not before:
        return "–"
    points = f"{100 * (after / before - 1):+.1f}".replace("-", "−")
    return f"{'±0' if points[1:] == '0.0' else points}{NBSP}%"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, with the unit."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def date(stamp: str) -> str:
    """An ISO date and time as people write it, in UTC where it says its zone."""
    moment = datetime.fromisoformat(stamp)
    zone = ""
    if moment.tzinfo is not None:
        moment, zone = moment.astimezone(UTC), " UTC"
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M}{zone}"


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun: "1 process", "2 processes".

    Args:
        count: How many.
        noun: For one.
        nouns: For others; with an s by default.
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was counted over so many images."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half
