"""HTML tables for notebooks, returned by the `_repr_html_` of LucidPrune's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

#: Largest number of rows shown, since a notebook is no place for hundreds.
MAX_ROWS = 40
_CELL = "padding:2px 10px 2px 0;vertical-align:top;text-align:"


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Sequence[str] = ()
) -> str:
    """Build an HTML table in the colours of its page. All text is escaped.

    Args:
        title: Title above the table.
        columns: Names of the columns; none for a table without rows.
        rows: Cells. Numbers are right-aligned; None is shown as a dash.
        notes: Lines below the table.
    """
    listed = [list(row) for row in rows]
    below = list(notes)
    if len(listed) > MAX_ROWS:
        below.insert(0, f"… and {len(listed) - MAX_ROWS} more rows")
    head = "".join(f'<th style="{_CELL}left">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in listed[:MAX_ROWS])
    table = f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>' if listed else ""
    lines = "".join(f'<div style="opacity:.75">{escape(line)}</div>' for line in below)
    return f"<div><strong>{escape(title)}</strong>{table}{lines}</div>"


def _cell(value: object) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    if value is None:
        text = "–"
    return f'<td style="{_CELL}{"right" if number else "left"}">{escape(text)}</td>'


def share_words(part: float, whole: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * part / whole:.1f} %"
