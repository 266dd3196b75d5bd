"""`python -m pruning groups`: lists the coupled channel groups of a network, and what cannot be pruned and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.table import Table

from image_classification.command_parser import positive
from image_classification.file_writing import output_path, write_text
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.constraints import Constraints
from pruning.engine.group_rows import module_words, reason_words, width_words
from pruning.engine.trace_groups import trace_groups
from pruning.training.pruning_config import parse_limits
from pruning.verbs.images import example_images, network_of, size_of


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("arch", help="network: one of our own, torchvision/NAME or timm/NAME")
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="look at this (pruned) network's widths"
    )
    parser.add_argument(
        "--num-classes", type=positive, default=None, help="default: the checkpoint's, or 1000"
    )
    parser.add_argument("--image-size", type=positive, default=None, help="default: the architecture's")
    parser.add_argument("--round-to", type=int, default=Constraints.round_to, help="as in training")
    parser.add_argument("--min-width", type=float, default=Constraints.min_width, help="as in training")
    parser.add_argument(
        "--prune-ignore", action="append", default=[], metavar="PATTERN", help="as in training"
    )
    parser.add_argument(
        "--prune-limit", action="append", default=[], metavar="PATTERN=LEAST", help="as in training"
    )
    parser.add_argument("--members", action="store_true", help="list the tensors of every group too")
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="write everything there as well"
    )


def run(arguments: argparse.Namespace) -> int:
    """Trace the network and print its groups."""
    model = network_of(arguments.arch, arguments.checkpoint, arguments.num_classes, arguments.image_size)
    size = size_of(model, arguments.image_size)
    constraints = Constraints(
        arguments.round_to,
        arguments.min_width,
        tuple(arguments.prune_ignore),
        parse_limits(arguments.prune_limit),
    )
    graph = trace_groups(model, example_images(size), constraints=constraints)
    rows = graph.rows()
    _print_groups(arguments.arch, graph, rows, arguments.members)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps({"arch": arguments.arch, "groups": rows}, indent=2) + "\n")
    return 0


def _print_groups(arch: str, graph: ChannelGraph, rows: list[Plain], with_members: bool) -> None:
    table = Table(title=f"{arch}: {len(graph.prunable)} of {len(rows)} channel groups can be pruned")
    justified: dict[str, JustifyMethod] = {"group": "left", "width": "right", "least": "right"}
    for column, justify in justified.items():
        table.add_column(column, justify=justify)
    table.add_column("coupled modules", overflow="fold")
    table.add_column("why not, or what to know", overflow="fold")
    for row in rows:
        least = str(row["least_width"]) if row["prunable"] else "–"
        table.add_row(
            row["group"], width_words(row), least, module_words(row, with_members), reason_words(row)
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


VERB = declared(declare, run)
