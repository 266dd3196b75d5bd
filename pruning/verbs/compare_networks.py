"""`python -m pruning compare A B [C …] [--data DATA]`: compares networks side by side: costs, widths, accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from image_classification.command_parser import positive
from image_classification.config import check
from image_classification.device_flag import declare_device, device_named
from image_classification.figure_writing import check_figure, save_figure
from image_classification.file_writing import output_path, write_text
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.report.measure import accuracy_of
from pruning.report.networks import cost_rows, costs_of, load_network, same_architecture, widths_beside
from pruning.report.verdict import headline_of
from pruning.report.wording import change, number
from pruning.verbs.images import open_validation, size_of


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("first", type=Path, help="checkpoint that the others are compared with")
    parser.add_argument("others", type=Path, nargs="+", help="checkpoints of the same architecture")
    parser.add_argument("--data", default=None, help="data set; accuracy is measured on its validation split")
    parser.add_argument("--arch", default=None, help="not needed for LucidPrune checkpoints")
    parser.add_argument("--image-size", type=positive, default=None, help="default: the networks'")
    declare_device(parser)
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="write everything there as well"
    )
    parser.add_argument(
        "--plot",
        type=output_path,
        default=None,
        metavar="FILE",
        help="accuracy over MACs as an image; needs --data",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure all networks and print tables."""
    if arguments.plot is not None:
        problem = f"--plot {arguments.plot} shows accuracy: give --data, or leave --plot out"
        check(arguments.data is not None, problem)
        check_figure(arguments.plot, "--plot")
    device = device_named(arguments.device)
    paths = [arguments.first, *arguments.others]
    networks = [load_network(str(path), path, arguments.arch) for path in paths]
    first = networks[0]
    for other in networks[1:]:
        check(
            same_architecture(first.model, other.model),
            f"{first.name} and {other.name} are different architectures: compare networks of one",
        )
    size = size_of(networks[-1].model, arguments.image_size)
    accuracies: list[dict[str, float]] = []
    if arguments.data is not None:
        images = open_validation(
            arguments.data,
            networks[-1].model,
            paths[-1],
            arguments.image_size,
            device,
        )
        size = images.preset.image_size
        accuracies = [accuracy_of(network, images) for network in networks]
    costs = [costs_of(network.model.cpu(), size) for network in networks]
    plain: Plain = {
        "networks": [str(path) for path in paths],
        "image_size": size,
        "costs": costs,
        "widths": widths_beside([network.model for network in networks]),
        "accuracy": accuracies or None,
        "ahead": _ahead(costs, accuracies),
    }
    _print(plain)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(plain, indent=2) + "\n")
    if arguments.plot is not None:
        plot(plain, arguments.plot)
    return 0


def _ahead(costs: Sequence[dict[str, float]], accuracies: Sequence[dict[str, float]]) -> list[int] | None:
    """Return the positions of networks on the Pareto front of MACs and accuracy; None without accuracy."""
    if not accuracies:
        return None
    key = headline_of(list(accuracies))
    points = [(cost["macs"], -figures[key]) for cost, figures in zip(costs, accuracies, strict=True)]
    return [
        place
        for place, point in enumerate(points)
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    ]


def _print(plain: Plain) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    names, costs, accuracies = plain["networks"], plain["costs"], plain["accuracy"]
    numbers = [str(place + 1) for place in range(len(names))]
    for place, name in zip(numbers, names, strict=True):
        console.print(f"{place}: {name}", highlight=False)
    table = Table(title=f"{plain['image_size']} px; changes from network 1")
    table.add_column("")
    for place in numbers:
        table.add_column(place, justify="right")
    for metric, (title, unit, divisor) in cost_rows().items():
        values = [cost[metric] for cost in costs]
        cells = [number(values[0] / divisor)]
        cells += [f"{number(value / divisor)} ({change(value, values[0])})" for value in values[1:]]
        table.add_row(f"{title}, {unit}", *cells)
    for key in accuracies[0] if accuracies else ():
        values = [figures[key] for figures in accuracies]
        cells = [number(values[0], 4)]
        cells += [f"{number(value, 4)} ({value - values[0]:+.3g})".replace("-", "−") for value in values[1:]]
        table.add_row(key if key == "loss" else f"{key}, %", *cells)
    console.print(table)
    if plain["ahead"] is not None and len(names) > 2:
        ahead = ", ".join(numbers[place] for place in plain["ahead"])
        console.print(f"no other network has fewer MACs and is as accurate: {ahead}")
    changed = [row for row in plain["widths"] if len(set(row["widths"])) > 1]
    if not changed:
        console.print("all layers have the same widths")
        return
    console.print(f"{len(changed)} of {len(plain['widths'])} layers have other widths:")
    listed = Table()
    for column in ("layer", *numbers):
        listed.add_column(column, justify="left" if column == "layer" else "right")
    for row in changed:
        listed.add_row(row["layer"], *map(str, row["widths"]))
    console.print(listed)


def plot(plain: Plain, path: Path) -> None:
    """Plot accuracy over MACs: a point per network, with the Pareto front joined by a line.

    Args:
        plain: The verb's JSON output, with accuracy.
        path: Output file.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    key = headline_of(plain["accuracy"])
    points = [
        (cost["macs"] / 1e6, figures[key])
        for cost, figures in zip(plain["costs"], plain["accuracy"], strict=True)
    ]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    line = sorted(points[place] for place in plain["ahead"])
    axes.plot([x for x, _ in line], [y for _, y in line], color="#2b6cb0", zorder=1)
    axes.scatter([x for x, _ in points], [y for _, y in points], color="#c05621", zorder=2)
    for place, point in enumerate(points):
        axes.annotate(str(place + 1), point, xytext=(5, 5), textcoords="offset points")
    axes.set_xlabel("million multiply-accumulates")
    axes.set_ylabel(f"{key}, %")
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=130)


VERB = declared(declare, run)
