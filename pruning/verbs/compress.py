"""`python -m pruning compress CHECKPOINT IMAGES`: a trained network becomes smaller in minutes, without training."""

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
from image_classification.file_writing import write_text
from image_classification.models import arch_info, identity_of, input_of, model_for_weights
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.costs import cost_names
from pruning.costs.budget import Budget
from pruning.costs.latency_measure import measure_networks
from pruning.costs.latency_table import LatencySettings
from pruning.criteria import criterion_names
from pruning.criteria.by_name import make_criterion
from pruning.engine.channel_graph import DEFAULT_MIN_WIDTH, Constraints
from pruning.files.saved_network import save_pruned
from pruning.repair.repairing import REPAIR_METHODS, RepairSettings
from pruning.report.compressed_page import render
from pruning.verbs.compressing import CompressSettings, Point, compress, divergence, outputs_of
from pruning.verbs.plain_images import PlainImages, read_folder
from pruning.verbs.shrink import find_factory

_SECONDS = 10.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "checkpoint", type=Path, help="trained network: a checkpoint of ours, or weights with --arch"
    )
    parser.add_argument(
        "images", type=Path, help="folder of images, with or without class folders; labels are not needed"
    )
    parser.add_argument("--arch", default=None, help="architecture of the weights, such as timm/resnet50")
    parser.add_argument(
        "--factory",
        default=None,
        metavar="MODULE:FUNCTION",
        help="builds a network of your own, in place of --arch",
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        default=["macs=0.75"],
        metavar="METRIC=SHARE[,SHARE…]",
        help=f"share of a cost ({', '.join(cost_names())}) that may remain; several shares give a curve to choose from",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the smaller network, such as small.pth.tar"
    )
    parser.add_argument("--num-images", "-n", type=int, default=160, help="images to calibrate with")
    parser.add_argument(
        "--num-judged", type=int, default=500, help="other images of the folder to measure on"
    )
    parser.add_argument(
        "--repair", choices=REPAIR_METHODS, default=RepairSettings.method, help="as in training"
    )
    parser.add_argument(
        "--criterion",
        default="reconstruction",
        help=f"what orders channels: one of {', '.join(criterion_names())}",
    )
    parser.add_argument("--round-to", type=int, default=Constraints.round_to, help="as in training")
    parser.add_argument("--min-width", type=float, default=DEFAULT_MIN_WIDTH, help="as in training")
    parser.add_argument(
        "--prune-ignore", nargs="+", default=[], metavar="PATTERN", help="modules that are left alone"
    )
    parser.add_argument("--image-size", type=int, default=None, help="default: the architecture's")
    parser.add_argument(
        "--resize", type=int, default=None, help="short side before the crop; default: likewise"
    )
    parser.add_argument(
        "--mean", type=float, nargs=3, default=None, help="normalisation; default: the architecture's"
    )
    parser.add_argument("--std", type=float, nargs=3, default=None, help="likewise")
    parser.add_argument("--seed", type=int, default=0, help="which images are drawn")
    parser.add_argument(
        "--latency", action=argparse.BooleanOptionalAction, default=True, help="time the networks"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(arguments: argparse.Namespace) -> int:
    """Compress, measure, write."""
    _check(arguments)
    budgets = parse_budgets(arguments.budget)
    factory = None if arguments.factory is None else find_factory(arguments.factory)
    model = (
        model_for_weights(arguments.arch, arguments.checkpoint, factory=factory).to(arguments.device).eval()
    )
    wanted = _format(arguments, model)
    identity = identity_of(model)
    classes = None if identity is None else identity.num_classes
    found = read_folder(
        arguments.images, arguments.num_images + arguments.num_judged, wanted, classes, arguments.seed
    )
    count = min(arguments.num_images, max(1, 3 * len(found.images) // 4))
    calibration, judged = found.split(count)
    check(len(judged.images) > 0, f"IMAGES {arguments.images}: one image is not enough: give some more")
    print(
        f"{len(calibration.images)} images to calibrate with, {len(judged.images)} others to measure on, of "
        f"{found.num_found} in {arguments.images}"
    )
    console = Console(stderr=True)
    settings = CompressSettings(
        criterion=make_criterion(arguments.criterion),
        repair=RepairSettings(method=arguments.repair),
        constraints=Constraints(arguments.round_to, arguments.min_width, tuple(arguments.prune_ignore)),
        announce=lambda text: console.print(text, highlight=False),
    )
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
    """`["macs=0.9,0.75"]` → `[{"macs": 0.9}, {"macs": 0.75}]`; several costs make one budget.

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
        ConfigError: Naming the flag.
    """
    for name in ("num_images", "num_judged", "image_size", "resize", "round_to"):
        value = getattr(arguments, name)
        check(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: give a whole number ≥ 1")
    check(arguments.seed >= 0, f"--seed {arguments.seed} is negative")
    check(
        arguments.arch is None or arguments.factory is None,
        "--arch and --factory exclude each other: the factory says what is built",
    )
    check(
        arguments.checkpoint.resolve() != arguments.output.resolve(),
        f"--output {arguments.output}: the checkpoint itself; give another name",
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)


def _format(arguments: argparse.Namespace, model: nn.Module) -> NetworkInput:
    """What the flags say of the images, else the checkpoint, else the architecture."""
    identity = identity_of(model)
    known = input_of(model)
    if known is None and identity is not None:
        known = arch_info(identity.arch).network_input
    if known is None:
        missing = None in (arguments.image_size, arguments.mean, arguments.std)
        check(
            not missing,
            "--image-size, --mean and --std are needed: the checkpoint does not name its architecture",
        )
        known = NetworkInput(arguments.image_size, arguments.image_size, arguments.mean, arguments.std)
    own = None if identity is None or input_of(model) is not None else identity.image_size
    size = int(arguments.image_size or own or known.image_size)
    resize = arguments.resize or round(size * known.resize / known.image_size)
    check(resize >= size, f"--resize {resize} is smaller than the image size {size}: raise it")
    mean, std = tuple(arguments.mean or known.mean), tuple(arguments.std or known.std)
    return NetworkInput(size, resize, mean, std, known.geometry)


class _Judge:
    """Measures networks beside the original, on images that were not used to compress it."""

    def __init__(self, original: nn.Module, judged: PlainImages, device: torch.device, latency: bool) -> None:
        self.original = original
        self.labels = judged.labels
        self.latency = latency
        self.images = judged.images.to(device)
        self.expected = outputs_of(original, self.images)

    def row(self, name: str, model: nn.Module, point: Point | None) -> Plain:
        """Everything that is known of a network, as plain data."""
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
            example = (self.images[:1],)
            seconds = measure_networks(
                [self.original, model], example, LatencySettings(batch_size=1), _SECONDS
            )
            row["milliseconds"] = [1000 * value for value in seconds]
        return row


def _path(output: Path, point: Point, num_points: int) -> Path:
    """The file of a point: `small.pth.tar`, or `small-macs0.75.pth.tar` where there are several."""
    if num_points == 1:
        return output
    ((metric, share),) = point.budget.items()
    stem, dot, suffixes = output.name.partition(".")
    return output.with_name(f"{stem}-{metric}{share:g}{dot}{suffixes}")


def _write(
    arguments: argparse.Namespace, rows: list[Plain], calibration: PlainImages, judged: PlainImages
) -> None:
    """Print the table; write JSON and page beside the output."""
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
    """The networks, a line each."""
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
