"""Amortised explanations end to end: predictor and selector of a trained network, with RBF and REAL-X masks.

    python benchmarks/selector.py DATA --pretrained-weights f.pth.tar --workspace DIR [--kinds rbf real-x]

Everything is done by `python -m explainers`. The table has figures over the whole validation split, which was not used
for choosing the networks: KL, agreement and area of the masks without noise, how often their highest pixel lies on the
object, ROC-AUC. The JSON also has the pointing game compared with Grad-CAM and the image's centre, on the images that
the network classifies correctly. Trainings finished in DIR are not repeated; interrupted ones continue.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common.jobs import log_rows, run_python, train_once
from common.report import BenchmarkParser, print_table, write_json

COLUMNS = ("agreement", "kl", "area", "on_object", "within_object", "auc", "width")


def train(verb: str, workspace: Path, arguments: argparse.Namespace, *words: str) -> float:
    """Train unless already done; return seconds over all invocations."""
    command = ["-m", "explainers", verb, arguments.data, "--arch", arguments.arch]
    command += ["--pretrained-weights", str(arguments.pretrained_weights), "--device", arguments.device.type]
    command += ["--lr-schedule", "cosine", "--seed", str(arguments.seed)]
    return train_once(workspace, *command, *words, *arguments.flags.split())


def train_kind(kind: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train predictor and selector of one kind of masks; return the seconds of each."""
    words = ["--selector-type", kind, "-b", "64", "--evaluation-interval", "200"]
    words += ["--epochs", str(arguments.predictor_epochs), "--lr", str(arguments.predictor_lr)]
    predictor = train("train-predictor", folder / "predictor", arguments, *words)
    words = ["--predictor", str(folder / "predictor" / "model_best.pth.tar"), "-b", "16"]
    words += ["--epochs", str(arguments.selector_epochs), "--lr", str(arguments.selector_lr)]
    selector = train("train-selector", folder / "selector", arguments, *words)
    return {"predictor": predictor, "selector": selector}


def judge(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return figures of the masks and the pointing game of other methods, and write a page of masks."""
    selector, predictor = (str(folder / name / "model_best.pth.tar") for name in ("selector", "predictor"))
    figures, localized = folder / "figures.json", folder / "localized.json"
    explain = ["-m", "explainers"]
    device = ["--device", arguments.device.type]
    pair = [arguments.data, "--selector", selector, "--predictor", predictor, *device]
    run_python(*explain, "evaluate-selector", *pair, "--json", str(figures))
    run_python(*explain, "visualize", *pair, "-o", str(folder / "masks.png"))
    words = ["localize", arguments.data, "--checkpoint", str(arguments.pretrained_weights), *device]
    for method in ("selector", "gradcam", "centre"):
        words += ["--method", method]
    words += ["--selector", selector, "--metric", "point", "--metric", "auc", "--json", str(localized)]
    run_python(*explain, *words)
    rows = json.loads(localized.read_text(encoding="utf-8"))["rows"]
    return {
        "validation": json.loads(figures.read_text(encoding="utf-8"))["figures"],
        "pointing_game": {row["method"]: row["figures"] | row["counts"] for row in rows},
    }


def run_kind(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate predictor and selector for one kind of masks."""
    folder = arguments.workspace / kind
    seconds = train_kind(kind, arguments, folder)
    epochs, chosen_by = {}, {}
    for name in ("predictor", "selector"):
        payload = torch.load(folder / name / "model_best.pth.tar", weights_only=True)
        epochs[name] = payload["config"]["epochs"]
        chosen_by[name] = payload["callbacks"][name]["figures"]
    rows = log_rows(folder / "selector" / "experiment_raport.json")
    course = [row for row in rows if "val.agreement" in row]
    found = {"epochs": epochs, "seconds": seconds, "chosen_by": chosen_by, "course": course}
    return found | judge(arguments, folder)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--pretrained-weights", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["rbf", "real-x"], choices=["rbf", "real-x"])
    parser.add_argument("--predictor-epochs", type=int, default=12)
    parser.add_argument("--predictor-lr", type=float, default=5e-4)
    parser.add_argument("--selector-epochs", type=int, default=8)
    parser.add_argument("--selector-lr", type=float, default=1e-4)
    parser.add_argument("--flags", default="", help="further flags of both training verbs, in one word")
    small = {"kinds": ["rbf"], "predictor_epochs": 1, "selector_epochs": 1}
    return parser.parse("selector_shapes.json", quick=small)


def main() -> None:
    """Run, print the table and write JSON."""
    arguments = parse()
    results = {kind: run_kind(kind, arguments) for kind in arguments.kinds}
    rows = []
    for kind, result in results.items():
        figures = [f"{result['validation'].get(name, float('nan')):.3f}" for name in COLUMNS]
        rows.append([kind, *figures, f"{sum(result['seconds'].values()):.0f}"])
    print_table(["masks", *COLUMNS, "seconds"], rows)
    write_json(arguments, 1, {"results": results})


if __name__ == "__main__":
    main()
