"""Does compression keep what a network looks at? Three compressions, each without and with attribution matching.

    python benchmarks/preserve.py --workdir DIR [--seeds 3] [--minutes 30] [--output FILE.json]

On multi-label `shapes`, whose masks are exact: a teacher, then

distillation   a student of half its widths from scratch, under the teacher's logits
one-shot       40 % of the channels of every group cut at once by L1 norm, then fine-tuning
unstructured   4 rounds of 35 % of the weights that are left (82 % zeros), each with fine-tuning

each with no matching, EWA, SWA and stochastic SWA, as `main.py` runs them. Judged at the end of training (never at the
best epoch) on the validation split: mAP and F1; pointing game and ROC-AUC of Grad-CAM and LRP on the masks, over the
pairs of picture and class that the network predicts. All students of all seeds have the same teacher. Finished cells
are kept in the work directory; a second call goes on. After `--minutes` no further cell is begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from explainers.base import create_method
from explainers.evaluate import localize
from explainers.job import Network, PictureConfig, picture_loader
from image_classification.data.build import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.distributed import Distributed
from image_classification.environment import describe_environment
from image_classification.models import model_for_weights
from image_classification.report import read_report

MATCHINGS: dict[str, list[str]] = {
    "none": [],
    "EWA": ["--match", "ewa"],
    "SWA": ["--match", "swa"],
    "stochastic SWA": ["--match", "swa", "--stochastic", "--drop-percent", "0.3"],
}
COMPRESSIONS = ("distillation", "one-shot", "unstructured")
METHODS = ("gradcam", "lrp")
FIGURES = ("map", "f1", *(f"{method}_{figure}" for method in METHODS for figure in ("point", "auc")))
COMMON = [
    "--multi-label", "--arch", "resnet20", "--batch-size", "64", "--amp", "--memory-format", "nhwc",
    "--workers", "1", "--raport-file", "report.json", "--print-freq", "1000",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cells share."""

    data: str
    image_size: int
    workdir: Path
    epochs: dict[str, int]

    def words(self, name: str, *more: str) -> list[str]:
        """The command of a training."""
        return [
            sys.executable, str(ROOT / "main.py"), self.data, *COMMON, "--image-size", str(self.image_size),
            "--workspace", str(self.workdir / name), "--resume", "auto", *more,
        ]  # fmt: skip


def narrow_widths(divisor: int = 2) -> str:
    """Every convolution of ResNet-20 with a part of its channels, as `--arch-option` takes it."""
    widths = {"conv1": 16 // divisor}
    for stage, planes in enumerate((16, 32, 64), start=1):
        widths |= {f"layer{stage}.{block}.conv1": planes // divisor for block in range(3)}
        if stage > 1:
            widths[f"layer{stage}.0.conv2"] = planes // divisor
    return "widths=" + json.dumps(widths)


def training_words(compression: str, teacher: Path, epochs: dict[str, int]) -> list[str]:
    """The flags of a compression, matching aside. `none` without a teacher is plain training."""
    start = ["--pretrained-weights", str(teacher)]
    length = ["--epochs", str(epochs[compression])]
    if compression == "distillation":
        return [
            *length, "--arch-option", narrow_widths(), "--teacher", str(teacher), "--distill", "logit",
            "--lr", "0.1", "--warmup", "1",
        ]  # fmt: skip
    if compression == "one-shot":
        cut = ["--one-shot-pruning", "0.4", "--prune-rate", "*", "--pruning-criterion", "magnitude"]
        return [*length, *start, *cut, "--calibration-batches", "1", "--lr", "0.03"]
    rounds = ["--unstructured-pruning", "0.35", "--rounds", "4"]
    return [*length, *start, *rounds, "--lr", "0.03"]


def train(setting: Setting, name: str, flags: list[str]) -> dict[str, float]:
    """Run a training to its end and return the figures of its last validation."""
    folder = setting.workdir / name
    done = folder / "done.json"
    if not done.is_file():
        begin = time.perf_counter()
        subprocess.run(setting.words(name, *flags), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        entries = [e["data"] for e in read_report(folder / "report.json") if "val.map" in e.get("data", {})]
        figures = {key: entries[-1][f"val.{key}"] for key in ("map", "f1", "loss")}
        figures["seconds"] = time.perf_counter() - begin
        done.write_text(json.dumps(figures))
    return json.loads(done.read_text())


def located(setting: Setting, checkpoint: Path) -> dict[str, float | None]:
    """Localisation figures of a checkpoint on the validation split."""
    data = DataConfig(data=setting.data, batch_size=64, image_size=setting.image_size, workers=1)
    dataset = open_dataset(setting.data, multi_label=True, progress=False)
    model = model_for_weights(None, checkpoint, image_size=setting.image_size).eval().requires_grad_(False)
    network = Network("network", model)
    example = torch.zeros(1, 3, setting.image_size, setting.image_size)
    prepared = network.prepare({name: create_method(name) for name in METHODS}, example)
    preset = data.resolved_preset(dataset.preset)
    pictures, distributed = PictureConfig(), Distributed()
    with picture_loader(dataset.val, preset, data, pictures, distributed, with_masks=True) as loader:
        rows = localize(
            "network", prepared, network.predict, loader, metrics=("point", "auc"), multi_label=True,
            distributed=distributed, max_pairs=128,
        )  # fmt: skip
    figures: dict[str, float | None] = {}
    for row in rows:
        for key in ("point", "auc"):  # undefined where no pair was predicted
            value = row.figures[key]
            figures[f"{row.method}_{key}"] = None if math.isnan(value) else 100 * value
        figures["predicted"], figures["pairs"] = row.counts["predicted"], row.counts["pairs"]
    kept = [p for p in model.parameters() if p.dim() > 1]
    figures["weights"] = sum(int((p != 0).sum()) for p in kept)
    return figures


def cell(setting: Setting, name: str, flags: list[str]) -> dict[str, Any]:
    """Train and judge; what was finished before is read."""
    path = setting.workdir / name / "cell.json"
    if not path.is_file():
        figures: dict[str, Any] = {**train(setting, name, flags)}
        figures |= located(setting, setting.workdir / name / "checkpoint.pth.tar")
        path.write_text(json.dumps(figures))
    return json.loads(path.read_text())


def summarised(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, spread and n of every compression and matching over its seeds."""
    rows = []
    keys = dict.fromkeys((c["compression"], c["matching"]) for c in cells)
    for compression, matching in keys:
        mine = [c for c in cells if (c["compression"], c["matching"]) == (compression, matching)]
        row: dict[str, Any] = {"compression": compression, "matching": matching, "n": len(mine)}
        for figure in (*FIGURES, "predicted", "weights", "seconds"):
            values = [c[figure] for c in mine if c[figure] is not None]
            row[figure] = {
                "mean": statistics.fmean(values) if values else None,
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per row, mean ± standard deviation."""
    heads = [figure.replace("gradcam", "cam").replace("_", " ") for figure in FIGURES]
    print(f"{'compression':13} {'matching':15} n " + " ".join(f"{head:>12}" for head in heads))
    for row in rows:
        values = []
        for figure in FIGURES:
            mean, sd = row[figure]["mean"], row[figure]["sd"]
            values.append("–" if mean is None else f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}"))
        print(
            f"{row['compression']:13} {row['matching']:15} {row['n']} " + " ".join(f"{v:>12}" for v in values)
        )


def main() -> None:
    """Train, judge, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--data", default="shapes-multi:train=6000,val=500")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--teacher-lr", type=float, default=0.4)
    parser.add_argument(
        "--pretrained-weights",
        type=Path,
        default=None,
        help="the teacher starts from these, as from ImageNet's in the paper",
    )
    parser.add_argument("--distillation-epochs", type=int, default=4)
    parser.add_argument("--one-shot-epochs", type=int, default=2)
    parser.add_argument("--unstructured-epochs", type=int, default=4, help="a multiple of the 4 rounds")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "preserve_shapes.json"
    )
    arguments = parser.parse_args()
    epochs = {name: vars(arguments)[f"{name.replace('-', '_')}_epochs"] for name in COMPRESSIONS}
    setting = Setting(arguments.data, arguments.image_size, arguments.workdir, epochs)
    end = time.monotonic() + 60 * arguments.minutes
    teacher_flags = ["--epochs", str(arguments.teacher_epochs), "--warmup", "1"]
    teacher_flags += ["--lr", str(arguments.teacher_lr)]
    if arguments.pretrained_weights is not None:
        teacher_flags += ["--pretrained-weights", str(arguments.pretrained_weights)]
    teacher = cell(setting, "teacher", teacher_flags)
    cells: list[dict[str, Any]] = [
        {"compression": "teacher", "matching": "–", "seed": 0, **teacher},
    ]
    checkpoint = arguments.workdir / "teacher" / "checkpoint.pth.tar"
    for seed, compression, matching in itertools.product(
        range(1, arguments.seeds + 1), COMPRESSIONS, MATCHINGS
    ):
        name = f"{compression}-{matching.replace(' ', '-')}-{seed}"
        if time.monotonic() > end and not (arguments.workdir / name / "cell.json").is_file():
            continue
        flags = [*training_words(compression, checkpoint, epochs), "--seed", str(seed), *MATCHINGS[matching]]
        if matching != "none" and "--teacher" not in flags:
            flags += ["--teacher", str(checkpoint)]
        found = cell(setting, name, flags)
        cells.append({"compression": compression, "matching": matching, "seed": seed, **found})
        print(f"seed {seed} {compression} {matching}: {found}", flush=True)
        report = {
            "settings": {
                k: v.name if isinstance(v, Path) else str(v)
                for k, v in vars(arguments).items() if k not in ("output", "workdir")
            },
            "rows": summarised(cells), "cells": cells, "environment": describe_environment(torch.device("cpu")),
        }  # fmt: skip
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(summarised(cells))


if __name__ == "__main__":
    main()
