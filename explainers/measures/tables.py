"""Tables of results: on standard output, and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from rich.console import Console
from rich.table import Table

#: A name or a figure.
Cell = str | float


def print_table(
    title: str,
    rows: Sequence[Mapping[str, Cell]],
    names: Sequence[str],
    figures: Sequence[str],
    percent: Collection[str],
) -> None:
    """Print rows as a table.

    Args:
        title: Title above the table.
        rows: Each with all columns.
        names: Columns of text.
        figures: Columns of numbers.
        percent: Those of `figures` that are shares, shown in percent.
    """
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True)
    for figure in figures:
        unit = "\n%" if figure in percent else ""
        table.add_column(f"{figure.replace('_', ' ')}{unit}", justify="right", no_wrap=True)
    for row in rows:
        numbers = [formatted(float(row[figure]), figure in percent) for figure in figures]
        table.add_row(*(str(row[name]) for name in names), *numbers)
    show(table)


def formatted(value: float, percent: bool) -> str:
    """Format a number with three decimals, or as a percentage with one; – if it is undefined."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def without_nan(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Return figures for JSON, which has no NaN: null for undefined ones."""
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def show(table: Table) -> None:
    """Print a table in full width, also into a log file, where rich would cut it off at 80 columns."""
    console = Console()
    width = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, width)).print(table)
