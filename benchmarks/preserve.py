"""Does compression preserve a network's explanations? Three compressions, each without and with attribution matching.

    python benchmarks/preserve.py --workspace DIR [--seeds 1 2 3] [--minutes 30] [--matchings none SWA]

On multi-label `shapes`, whose masks are exact, a teacher is trained, and then

distillation   a student of half its widths, from scratch, under the teacher's logits one-shot       40 % of the
channels of every group cut at once by L1 norm, then fine-tuning unstructured   4 rounds that each zero 35 % of the
remaining weights (82 % in all), with fine-tuning after each

each without matching, with EWA, SWA and stochastic SWA, all by `main.py`. The table has mean ± standard deviation over
the seeds, at the end of training (never of the best epoch), on the validation split: mAP and F1; pointing game and
ROC-AUC of Grad-CAM and LRP on the masks, over the pairs of image and class that the network predicts. Students of all
seeds have the same teacher. Finished cells are kept in the workspace, so a second call continues. After `--minutes` no
further cell is started.

`--settings published` uses the learning rates, momentum, loss weights and repair of the paper's program: students by
SGD at 0.1 without momentum, ÷ 10 at 3/7, 4/7 and 5/7 of the epochs, α = 0.9; pruned networks at a constant 0.001,
without repair.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from common.jobs import MAIN, log_rows, train_once
from common.measure import mean_and_deviation, with_deviation
from common.report import BenchmarkParser, print_table, write_json
from torch import nn

from explainers.attribution.method import create_method
from explainers.measures.evaluate import localize
from explainers.verbs.attribution_job import ImageConfig, Network, image_loader
from image_classification.data.data_config import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.distributed import Distributed
from image_classification.models import model_for_weights

MATCHINGS: dict[str, list[str]] = {
    "none": [],
    "EWA": ["--match", "ewa"],
    "SWA": ["--match", "swa"],
    "stochastic SWA": ["--match", "swa", "--stochastic", "--drop-percent", "0.3"],
}
SETTINGS = ("ours", "published")
COMPRESSIONS = ("distillation", "one-shot", "unstructured")
METHODS = ("gradcam", "lrp")
FIGURES = ("map", "f1", *(f"{method}_{figure}" for method in METHODS for figure in ("point", "auc")))
COMMON = ["--multi-label", "--arch", "resnet20", "--batch-size", "64", "--amp", "--memory-format", "nhwc"]
COMMON += ["--workers", "1", "--raport-file", "report.json", "--print-freq", "1000"]

Cell = dict[str, Any]
Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings shared by all cells."""

    data: str
    image_size: int
    device: torch.device
    workspace: Path

    @property
    def teacher(self) -> Path:
        """The teacher's checkpoint."""
        return self.workspace / "teacher" / "checkpoint.pth.tar"


def narrow_widths(divisor: int = 2) -> str:
    """Return every convolution of ResNet-20 with a part of its channels, in the form of `--arch-option`."""
    widths = {"conv1": 16 // divisor}
    for stage, planes in enumerate((16, 32, 64), start=1):
        for block in range(3):
            widths[f"layer{stage}.{block}.conv1"] = planes // divisor
        if stage > 1:
            widths[f"layer{stage}.0.conv2"] = planes // divisor
    return "widths=" + json.dumps(widths)


def compression_words(compression: str, teacher: Path) -> list[str]:
    """Return the flags of a compression, except length and matching."""
    if compression == "distillation":
        words = ["--arch-option", narrow_widths(), "--teacher", str(teacher), "--distill", "logit"]
        return [*words, "--lr", "0.1", "--warmup", "1"]
    words = ["--pretrained-weights", str(teacher), "--lr", "0.03"]
    if compression == "one-shot":
        words += ["--one-shot-pruning", "0.4", "--prune-rate", "*", "--pruning-criterion", "magnitude"]
        return [*words, "--calibration-batches", "1"]
    return [*words, "--unstructured-pruning", "0.35", "--rounds", "4"]


def published_words(compression: str, epochs: int) -> list[str]:
    """Return the deviating settings of the paper's program; these come last, and win."""
    if compression != "distillation":
        return ["--lr", "0.001", "--lr-schedule", "constant", "--repair", "none"]
    steps = [str(round(epochs * share)) for share in (3 / 7, 4 / 7, 5 / 7)]
    words = ["--lr", "0.1", "--warmup", "0", "--momentum", "0", "--distill-weight", "0.9"]
    return [*words, "--lr-schedule", "step", "--lr-step-epochs", *steps]


def cell_words(
    arguments: argparse.Namespace, compression: str, matching: str, settings: str, teacher: Path
) -> list[str]:
    """Return the flags of a cell, except its seed."""
    epochs = vars(arguments)[f"{compression.replace('-', '_')}_epochs"]
    words = [*compression_words(compression, teacher), "--epochs", str(epochs), *MATCHINGS[matching]]
    if matching != "none" and "--teacher" not in words:
        words += ["--teacher", str(teacher)]
    return words + (published_words(compression, epochs) if settings == "published" else [])


def trained(setting: Setting, name: str, words: list[str]) -> Figures:
    """Run a training to its end and return the figures of its last validation."""
    folder = setting.workspace / name
    command = [MAIN, setting.data, *COMMON, "--image-size", str(setting.image_size)]
    seconds = train_once(folder, *command, "--device", setting.device.type, *words)
    validations = [row for row in log_rows(folder / "report.json") if "val.map" in row]
    figures: Figures = {name: validations[-1][f"val.{name}"] for name in ("map", "f1", "loss")}
    return figures | {"seconds": seconds}


def located(setting: Setting, checkpoint: Path) -> Figures:
    """Return localisation figures of a checkpoint on the validation split."""
    data = DataConfig(data=setting.data, batch_size=64, image_size=setting.image_size, workers=1)
    dataset = open_dataset(setting.data, multi_label=True, progress=False)
    model = model_for_weights(None, checkpoint, image_size=setting.image_size, device=setting.device)
    network = Network("network", model.eval().requires_grad_(False))
    example = torch.zeros(1, 3, setting.image_size, setting.image_size, device=setting.device)
    prepared = network.prepare({name: create_method(name) for name in METHODS}, example)
    preset = data.resolved_preset(dataset.preset)
    distributed = Distributed(device=setting.device)
    with image_loader(dataset.val, preset, data, ImageConfig(), distributed, with_masks=True) as loader:
        rows = localize(
            "network",
            prepared,
            network.predict,
            loader,
            metrics=("point", "auc"),
            multi_label=True,
            distributed=distributed,
            max_pairs=128,
        )
    figures: Figures = {"weights": num_nonzero_weights(model)}
    for row in rows:
        for key in ("point", "auc"):  # undefined if no pair was predicted
            value = row.figures[key]
            figures[f"{row.method}_{key}"] = None if math.isnan(value) else 100 * value
        figures["predicted"] = row.counts["predicted"]
        figures["pairs"] = row.counts["pairs"]
    return figures


def num_nonzero_weights(model: nn.Module) -> int:
    """Return the number of non-zero weights of convolutions and linear layers."""
    return sum(int((weights != 0).sum()) for weights in model.parameters() if weights.dim() > 1)


def cell(setting: Setting, name: str, words: list[str]) -> Cell:
    """Train and evaluate a cell, or read its finished results."""
    path = setting.workspace / name / "cell.json"
    if not path.is_file():
        figures = trained(setting, name, words) | located(setting, path.parent / "checkpoint.pth.tar")
        path.write_text(json.dumps(figures), encoding="utf-8")
    found: Cell = json.loads(path.read_text(encoding="utf-8"))
    return found


def summarised(cells: list[Cell]) -> list[Cell]:
    """Return mean, deviation and number of every compression and matching over its seeds."""
    rows = []
    names = ("compression", "matching", "settings")
    for key in dict.fromkeys(tuple(found[name] for name in names) for found in cells):
        mine = [found for found in cells if tuple(found[name] for name in names) == key]
        row: Cell = {**dict(zip(names, key, strict=True)), "n": len(mine)}
        for figure in (*FIGURES, "predicted", "weights", "seconds"):
            values = [found[figure] for found in mine if found[figure] is not None]
            row[figure] = mean_and_deviation(values) | {"n": len(values)}
        rows.append(row)
    return rows


def print_rows(rows: list[Cell]) -> None:
    """Print one line per row, mean ± standard deviation."""
    heads = [figure.replace("gradcam", "cam").replace("_", " ") for figure in FIGURES]
    table = []
    for row in rows:
        figures = [with_deviation(row[figure]) for figure in FIGURES]
        table.append([row["compression"], row["matching"], row["settings"], str(row["n"]), *figures])
    print_table(["compression", "matching", "settings", "n", *heads], table, num_names=3)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, seeds=(1, 2, 3))
    parser.add_argument("data", nargs="?", default="shapes-multi:train=6000,val=500")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=None, help="begin no cell after so long")
    parser.add_argument("--compressions", nargs="+", choices=COMPRESSIONS, default=list(COMPRESSIONS))
    parser.add_argument("--matchings", nargs="+", choices=tuple(MATCHINGS), default=list(MATCHINGS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["ours"])
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--teacher-lr", type=float, default=0.4)
    parser.add_argument(
        "--pretrained-weights",
        type=Path,
        help="the teacher starts from these, as from ImageNet's in the paper",
    )
    parser.add_argument("--distillation-epochs", type=int, default=4)
    parser.add_argument("--one-shot-epochs", type=int, default=2)
    parser.add_argument("--unstructured-epochs", type=int, default=4, help="a multiple of the 4 rounds")
    quick = {
        "data": "shapes-multi:train=128,val=16",
        "seeds": [1],
        "compressions": ["one-shot"],
        "matchings": ["EWA"],
        "teacher_epochs": 2,
        "one_shot_epochs": 1,
    }
    return parser.parse("preserve_shapes.json", quick=quick)


def main() -> None:
    """Train, evaluate and report."""
    arguments = parse()
    begin = time.monotonic()
    setting = Setting(arguments.data, arguments.image_size, arguments.device, arguments.workspace)
    words = ["--epochs", str(arguments.teacher_epochs), "--warmup", "1", "--lr", str(arguments.teacher_lr)]
    if arguments.pretrained_weights is not None:
        words += ["--pretrained-weights", str(arguments.pretrained_weights)]
    cells = [
        {
            "compression": "teacher",
            "matching": "–",
            "settings": "–",
            "seed": 0,
            **cell(setting, "teacher", words),
        }
    ]
    kinds = itertools.product(arguments.compressions, arguments.matchings, arguments.settings)
    for seed, (compression, matching, settings) in itertools.product(arguments.seeds, list(kinds)):
        name = f"{compression}-{matching.replace(' ', '-')}-{seed}"
        name += "" if settings == "ours" else f"-{settings}"
        late = arguments.minutes is not None and time.monotonic() - begin > 60 * arguments.minutes
        if late and not (setting.workspace / name / "cell.json").is_file():
            continue
        words = cell_words(arguments, compression, matching, settings, setting.teacher)
        found = cell(setting, name, [*words, "--seed", str(seed)])
        kind = {"compression": compression, "matching": matching, "settings": settings, "seed": seed}
        cells.append(kind | found)
        print(f"{kind}: {found}", flush=True)
        write_json(arguments, len(arguments.seeds), {"rows": summarised(cells), "cells": cells})
    print_rows(summarised(cells))


if __name__ == "__main__":
    main()
