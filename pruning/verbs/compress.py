"""`python -m pruning compress CHECKPOINT IMAGES`: compresses a trained network in minutes, without training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from image_classification.config import check
from image_classification.file_writing import output_path, write_text
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.costs import cost_names
from pruning.costs.budget import Budget
from pruning.costs.latency_measure import measure_networks
from pruning.costs.latency_table import LatencySettings
from pruning.engine.examples import Example
from pruning.files.saved_network import save_pruned
from pruning.report.compressed_page import render
from pruning.verbs.compressing import Point, compress, divergence, outputs_of
from pruning.verbs.network_and_images import (
    check_network_and_images,
    declare_network_and_images,
    open_network,
    read_images,
    settings_of,
)
from pruning.verbs.plain_images import PlainImages

_SECONDS = 10.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    declare_network_and_images(parser)
    parser.add_argument(
        "--budget",
        nargs="+",
        default=["macs=0.75"],
        metavar="METRIC=SHARE[,SHARE…]",
        help=f"share of a cost ({', '.join(cost_names())}) that may remain; several shares give a curve to choose from",
    )
    parser.add_argument(
        "--output", type=output_path, required=True, help="the smaller network, such as small.pth.tar"
    )
    parser.add_argument(
        "--num-judged", type=int, default=500, help="other images of the folder to measure on"
    )
    parser.add_argument(
        "--latency", action=argparse.BooleanOptionalAction, default=True, help="time the networks"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compress the network, measure and write the results."""
    _check(arguments)
    budgets = parse_budgets(arguments.budget)
    model, factory = open_network(arguments)
    found = read_images(arguments, model, arguments.num_images + arguments.num_judged)
    count = min(arguments.num_images, max(1, 3 * len(found.images) // 4))
    calibration, judged = found.split(count)
    check(len(judged.images) > 0, f"IMAGES {arguments.images}: one image is not enough: give some more")
    print(
        f"{len(calibration.images)} images to calibrate with, {len(judged.images)} others to measure on, of "
        f"{found.num_found} in {arguments.images}"
    )
    console = Console(stderr=True)
    settings = settings_of(arguments, announce=lambda text: console.print(text, highlight=False))
    images = calibration.images.to(arguments.device)
    judge = _Judge(model, judged, torch.device(arguments.device), arguments.latency)
    rows = [judge.row("original", model, None)]
    for point in compress(model, images, budgets, settings):
        path = _path(arguments.output, point, len(budgets))
        save_pruned(path, point.model, factory=factory)
        rows.append(judge.row(str(path), point.model, point))
        rows[-1]["num_bytes"] = path.stat().st_size
    _write(arguments, rows, calibration, judged)
    return 0


def parse_budgets(words: list[str]) -> list[dict[str, float]]:
    """Parse `["macs=0.9,0.75"]` to `[{"macs": 0.9}, {"macs": 0.75}]`; several costs form one budget.

    Raises:
        SettingError, ConfigError: A word is not METRIC=SHARE, or several costs have several shares.
    """
    curves = [word for word in words if "," in word]
    check(
        not curves or len(words) == 1,
        f"--budget {' '.join(words)}: several shares make a curve over one cost: give one cost, or one share for each",
    )
    if not curves:
        return [dict(Budget.parse(words).shares)]
    metric, _, shares = words[0].partition("=")
    found = [dict(Budget.parse([f"{metric}={share}"]).shares) for share in shares.split(",") if share]
    return sorted(found, key=lambda budget: -budget[metric])


def _check(arguments: argparse.Namespace) -> None:
    """Refuse bad numbers before anything is read.

    Raises:
        ConfigError: A number is invalid; the message names the flag.
    """
    check_network_and_images(arguments)
    check(arguments.num_judged >= 1, f"--num-judged {arguments.num_judged}: give a whole number ≥ 1")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)


class _Judge:
    """Compares networks with the original, on images that were not used to compress it."""

    def __init__(self, original: nn.Module, judged: PlainImages, device: torch.device, latency: bool) -> None:
        self.original = original
        self.labels = judged.labels
        self.latency = latency
        self.images = judged.images.to(device)
        self.expected = outputs_of(original, self.images)

    def row(self, name: str, model: nn.Module, point: Point | None) -> Plain:
        """Return everything known about a network, as plain data."""
        logits = outputs_of(model, self.images)
        row: Plain = {
            "name": name,
            "agreement": float((logits.argmax(1) == self.expected.argmax(1)).float().mean()),
            "divergence": float(divergence(logits, (self.images, self.expected)).mean()),
        }
        if self.labels is not None:
            row["top1"] = float((logits.argmax(1).cpu() == self.labels).float().mean())
        if point is not None:
            row["budget"] = dict(point.budget)
            row["costs"] = {metric: list(values) for metric, values in point.costs.items()}
            row["seconds"] = point.seconds
            row["repair"] = None if point.repair is None else dataclasses.asdict(point.repair)
            row["widths"] = {
                group.name: [group.original_width, group.width]
                for group in point.graph.prunable
                if group.width < group.original_width
            }
        if self.latency:
            example = Example((self.images[:1],))
            seconds = measure_networks(
                [self.original, model], example, LatencySettings(batch_size=1), _SECONDS
            )
            row["milliseconds"] = [1000 * value for value in seconds]
        return row


def _path(output: Path, point: Point, num_points: int) -> Path:
    """Return the file of a point: `small.pth.tar`, or `small-macs0.75.pth.tar` if there are several."""
    if num_points == 1:
        return output
    ((metric, share),) = point.budget.items()
    stem, dot, suffixes = output.name.partition(".")
    return output.with_name(f"{stem}-{metric}{share:g}{dot}{suffixes}")


def _write(
    arguments: argparse.Namespace, rows: list[Plain], calibration: PlainImages, judged: PlainImages
) -> None:
    """Print the table; write JSON and page next to the output."""
    stem = arguments.output.name.partition(".")[0]
    plain = {
        "checkpoint": str(arguments.checkpoint),
        "images": str(arguments.images),
        "num_calibration": len(calibration.images),
        "num_judged": len(judged.images),
        "command": " ".join(["python", "-m", "pruning", *sys.argv[1:]]),
        "networks": rows,
    }
    page = arguments.output.with_name(f"{stem}.html")
    texts = {page.with_suffix(".json"): json.dumps(plain, indent=2) + "\n", page: render(plain)}
    for path, text in texts.items():
        write_text(path, text)
    Console(width=None if sys.stdout.isatty() else 120).print(_table(rows))
    print(f"table, curve and widths: {page}")


def _table(rows: list[Plain]) -> Table:
    """Return a table of the networks, one line each."""
    metrics = list(rows[-1]["costs"])
    labelled = "top1" in rows[0]
    table = Table(title="compressed without training")
    for column in (
        "network",
        *metrics,
        *(["top-1 %"] if labelled else []),
        "agreement %",
        "time",
        "made in s",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        costs = row.get("costs", dict.fromkeys(metrics, (1.0, 1.0)))
        cells = [row["name"], *(f"{now / before:.3f}" for before, now in costs.values())]
        if labelled:
            cells.append(f"{100 * row['top1']:.1f}")
        cells.append(f"{100 * row['agreement']:.1f}")
        times = row.get("milliseconds")
        cells.append("" if times is None else f"{times[1] / times[0]:.2f}")
        cells.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
        table.add_row(*cells)
    return table


VERB = declared(declare, run)
