"""`python -m pruning compare A B [--data DATA]`: two networks side by side: costs, widths, accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from image_classification.config import check
from image_classification.file_writing import write_text
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.report.measure import accuracy_of
from pruning.report.networks import cost_rows, costs_of, layer_widths, load_network, same_architecture
from pruning.report.wording import change, number
from pruning.verbs.images import open_validation, size_of


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("first", type=Path, help="checkpoint")
    parser.add_argument("second", type=Path, help="checkpoint of the same architecture")
    parser.add_argument("--data", default=None, help="data set; accuracy is measured on its validation split")
    parser.add_argument("--arch", default=None, help="not needed for checkpoints of ours")
    parser.add_argument("--image-size", type=int, default=None, help="default: the networks'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write everything there as well"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure both, print tables."""
    paths = (arguments.first, arguments.second)
    first, second = (load_network(str(path), path, arguments.arch) for path in paths)
    check(
        same_architecture(first.model, second.model),
        f"{paths[0]} and {paths[1]} are different architectures: compare networks of one",
    )
    size = size_of(second.model, arguments.image_size)
    accuracies: list[dict[str, float]] = []
    if arguments.data is not None:
        images = open_validation(
            arguments.data, second.model, paths[1], arguments.image_size, torch.device(arguments.device)
        )
        size = images.preset.image_size
        accuracies = [accuracy_of(network, images) for network in (first, second)]
    costs = [costs_of(network.model.cpu(), size) for network in (first, second)]
    widths = layer_widths(first.model, second.model)
    _print(arguments, size, costs, widths, accuracies)
    if arguments.json is not None:
        plain = {
            "networks": [str(path) for path in paths],
            "image_size": size,
            "costs": costs,
            "widths": widths,
            "accuracy": accuracies or None,
        }
        write_text(arguments.json, json.dumps(plain, indent=2) + "\n")
    return 0


def _print(
    arguments: argparse.Namespace,
    size: int,
    costs: list[dict[str, float]],
    widths: list[Plain],
    accuracies: list[dict[str, float]],
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{arguments.first} and {arguments.second}, {size} px")
    for column in ("", "first", "second", "change"):
        table.add_column(column, justify="right" if column else "left")
    for metric, (name, unit, divisor) in cost_rows().items():
        values = [cost[metric] for cost in costs]
        amounts = [number(value / divisor) for value in values]
        table.add_row(f"{name}, {unit}", *amounts, change(values[1], values[0]))
    for name in accuracies[0] if accuracies else ():
        before, after = (figures[name] for figures in accuracies)
        unit = "" if name == "loss" else ", %"
        table.add_row(
            f"{name}{unit}", number(before, 4), number(after, 4), f"{after - before:+.3g}".replace("-", "−")
        )
    console.print(table)
    changed = [row for row in widths if row["before"] != row["after"]]
    if not changed:
        console.print("all layers have the same widths")
        return
    listed = Table(title=f"{len(changed)} of {len(widths)} layers have other widths")
    for column in ("layer", "first", "second"):
        listed.add_column(column, justify="left" if column == "layer" else "right")
    for row in changed:
        listed.add_row(row["layer"], str(row["before"]), str(row["after"]))
    console.print(listed)


VERB = declared(declare, run)
