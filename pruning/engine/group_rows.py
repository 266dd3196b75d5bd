"""The groups of a channel graph as a table, for the command line and for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from image_classification.observe.html_table import html_table
from image_classification.plain_data import Plain
from pruning.engine.groups import Group, Member

_NUM_MODULES = 3


def group_row(group: Group, least_width: int, members: Sequence[Member]) -> Plain:
    """Return one group as plain data.

    Args:
        group: The group.
        least_width: Its smallest allowed width.
        members: The dimensions of tensors that carry its units.
    """
    return {
        "group": group.name,
        "width": group.width,
        "channels_per_unit": group.channels_per_unit,
        "least_width": least_width,
        "modules": list(dict.fromkeys(member.tensor.rpartition(".")[0] for member in members)),
        "tensors": [{"name": m.tensor, "dim": m.dim, "role": m.role} for m in members],
        "prunable": group.prunable,
        "reason": group.reason,
        "notes": list(group.notes),
    }


def width_words(row: Plain) -> str:
    """Format the width of a group's row, with the channels per unit if more than one."""
    unit = f" × {row['channels_per_unit']}" if row["channels_per_unit"] > 1 else ""
    return f"{row['width']}{unit}"


def module_words(row: Plain, everything: bool = False) -> str:
    """Format the modules of a group's row; only the first ones if there are many."""
    modules = row["modules"]
    if not everything and len(modules) > _NUM_MODULES + 1:
        modules = [*modules[:_NUM_MODULES], "…"]
    return ", ".join(modules)


def reason_words(row: Plain) -> str:
    """Format why a group cannot be pruned, and its notes."""
    return "; ".join(filter(None, [row["reason"], *row["notes"]]))


def groups_html(rows: Sequence[Plain]) -> str:
    """Return the HTML table of all groups for a notebook."""
    num_prunable = sum(row["prunable"] for row in rows)
    return html_table(
        f"{num_prunable} of {len(rows)} channel groups can be pruned",
        ("group", "width", "least", "coupled modules", "why not, or what to know"),
        [
            (
                row["group"],
                row["width"] if row["channels_per_unit"] == 1 else width_words(row),
                row["least_width"] if row["prunable"] else None,
                module_words(row),
                reason_words(row),
            )
            for row in rows
        ],
    )
