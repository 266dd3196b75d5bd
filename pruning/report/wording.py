"""Formatting of figures, dates and counts in the report."""

from __future__ import annotations

import math
from datetime import UTC, datetime

NBSP = "\N{NO-BREAK SPACE}"
_MONTHS = "January February March April May June July August September October November December".split()


def number(value: float | None, digits: int = 3) -> str:
    """Format a figure with this many significant digits and thousands separators; – if it is None."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """Format a share as a percentage with one decimal."""
    return "–" if share is None else f"{100 * share:.1f}{NBSP}%"


def change(after: float | None, before: float | None) -> str:
    """Format the difference as a percentage of the value before."""
    if after is None or not before:
        return "–"
    points = f"{100 * (after / before - 1):+.1f}".replace("-", "−")
    return f"{'±0' if points[1:] == '0.0' else points}{NBSP}%"


def duration(seconds: float | None) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def date(stamp: str) -> str:
    """Format an ISO date and time for readers, in UTC if it has a time zone."""
    moment = datetime.fromisoformat(stamp)
    zone = ""
    if moment.tzinfo is not None:
        moment, zone = moment.astimezone(UTC), " UTC"
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M}{zone}"


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """Format a count with its noun: "1 process", "2 processes".

    Args:
        count: The count.
        noun: Singular.
        nouns: Plural; by default the singular with an s.
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share counted over this many images."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half
