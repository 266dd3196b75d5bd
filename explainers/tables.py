"""Tables of results on standard output."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    figures: Sequence[str],
    percent: Collection[str],
) -> None:
    """Print rows.

    Args:
        title: Above the table.
        rows: Each with all columns.
        names: Columns of text.
        figures: Columns of numbers.
        percent: Those of them that are shares, to be shown in percent.
    """
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True)
    for figure in figures:
        unit = "\n%" if figure in percent else ""
        table.add_column(f"{figure.replace('_', ' ')}{unit}", justify="right", no_wrap=True)
    for row in rows:
        numbers = [formatted(row[figure], figure in percent) for figure in figures]
        table.add_row(*(str(row[name]) for name in names), *numbers)
    show(table)


def formatted(value: float, percent: bool) -> str:
    """A number with three digits after the point, or as a percentage with one; – where it is undefined."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def show(table: Table) -> None:
    """Print a table in full width: a log file has no width of its own, and a table that is cut off is of no use."""
    console = Console()
    width = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, width)).print(table)
