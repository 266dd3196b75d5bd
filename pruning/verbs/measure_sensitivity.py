"""`python -m pruning sensitivity CHECKPOINT IMAGES`: measures how far the outputs move when a channel group is
narrowed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from image_classification.config import check
from image_classification.figure_writing import save_figure
from image_classification.file_writing import output_path, write_text
from image_classification.observe.provenance import command_line
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.engine.channel_graph import ChannelGraph
from pruning.search.sensitivity import Curves, SensitivitySearch
from pruning.verbs.compressing import sensitivity
from pruning.verbs.network_and_images import (
    check_network_and_images,
    declare_network_and_images,
    open_network,
    read_images,
    settings_of,
)

REMOVED = (0.1, 0.25, 0.5, 0.75, 0.9)
_COLOURED = 1e-4  # share of the largest loss: the range that colours distinguish


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    declare_network_and_images(parser)
    parser.add_argument(
        "--removed",
        type=float,
        nargs="+",
        default=list(REMOVED),
        metavar="SHARE",
        help="shares of a group's channels that are taken away, one at a time",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=output_path,
        default=None,
        metavar="FILE",
        help="JSON, with a plot (.png) beside it; RUN/sensitivity.json goes into the report of RUN",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the sensitivities."""
    check_network_and_images(arguments)
    shares = sorted(set(arguments.removed))
    problem = f"--removed {' '.join(map(str, arguments.removed))}: give shares between 0 and 1"
    check(all(0 < share < 1 for share in shares), problem)
    output = arguments.output
    check(output is None or output.suffix == ".json", f"--output {output}: give a name that ends in .json")
    model, _ = open_network(arguments)
    images = read_images(arguments, model, arguments.num_images).images
    console = Console(stderr=True)
    settings = settings_of(
        arguments,
        search=SensitivitySearch(tuple(1 - share for share in shares), limit=math.inf),
        announce=lambda text: console.print(text, highlight=False),
    )
    graph, curves = sensitivity(model, images.to(arguments.device), settings)
    rows = rows_of(graph, curves, shares)
    check(
        bool(rows),
        "no group can be narrowed: lower --min-width or --round-to, or ignore less (--prune-ignore)",
    )
    plain: Plain = {
        "checkpoint": str(arguments.checkpoint),
        "images": str(arguments.images),
        "num_images": len(images),
        "repair": arguments.repair,
        "command": command_line(),
        "removed": shares,
        "groups": rows,
    }
    Console(width=None if sys.stdout.isatty() else 120).print(_table(plain))
    if output is not None:
        write_text(output, json.dumps(plain, indent=2) + "\n")
        plot(plain, output.with_suffix(".png"))
        print(f"wrote {output} and {output.with_suffix('.png').name}")
    return 0


def rows_of(graph: ChannelGraph, curves: Curves, removed: list[float]) -> list[Plain]:
    """Return a row per measured group, the least sensitive first.

    Returns:
        Rows of `group`, `width` and `losses`: for every share, the measured loss at the nearest width; None if the
            group has no such width.
    """
    measured: dict[str, dict[int, float]] = {}
    for candidate in curves.measured:
        if candidate.measured is not None:
            # Rounding can make a zero divergence slightly negative.
            measured.setdefault(candidate.group, {})[candidate.num_units] = max(candidate.measured, 0.0)
    rows: list[Plain] = []
    for name, losses in measured.items():
        width = graph.group(name).width
        row: list[float | None] = []
        for share in removed:
            nearest = min(losses, key=lambda count: abs(count - share * width))
            # The nearest width may be off by at most one step of the group's widths, or half a step of the shares.
            row.append(losses[nearest] if abs(nearest / width - share) <= 0.05 + 1 / width else None)
        rows.append({"group": name, "width": width, "losses": row})
    middle = min(range(len(removed)), key=lambda place: abs(removed[place] - 0.5))

    def at_half(row: Plain) -> float:
        known = [loss for loss in row["losses"] if loss is not None]
        return float(row["losses"][middle] if row["losses"][middle] is not None else max(known, default=0.0))

    return sorted(rows, key=at_half)


def _table(plain: Plain) -> Table:
    """Return a table of the groups, one line each."""
    how = "as they are" if plain["repair"] == "none" else f"after a repair by {plain['repair']}"
    table = Table(title=f"loss of the outputs with a group's channels removed, {how}")
    table.add_column("group")
    for column in ("width", *(f"−{100 * share:g} %" for share in plain["removed"])):
        table.add_column(column, justify="right")
    for row in plain["groups"]:
        cells = ["–" if loss is None else f"{loss:.2g}" for loss in row["losses"]]
        table.add_row(row["group"], str(row["width"]), *cells)
    return table


def plot(plain: Plain, path: Path) -> None:
    """Plot the losses as colours: a row per group, a column per share.

    Args:
        plain: The verb's JSON output.
        path: Output file.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = plain["groups"]
    losses = np.array([[np.nan if loss is None else loss for loss in row["losses"]] for row in rows])
    most = float(np.nanmax(losses, initial=1e-12))
    least = _COLOURED * most
    figure = Figure(figsize=(1.2 * len(plain["removed"]) + 4, 0.24 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(losses.clip(min=least), aspect="auto", cmap="viridis", norm=LogNorm(least, most))
    axes.set_xticks(range(len(plain["removed"])), [f"{100 * share:g} %" for share in plain["removed"]])
    axes.set_yticks(range(len(rows)), [row["group"] for row in rows], fontsize=7)
    axes.set_xlabel("channels removed")
    figure.colorbar(image, label="loss of the outputs")
    save_figure(figure, path, dpi=130)


VERB = declared(declare, run)
