"""Amortised explanations end to end: predictor and selector of a trained network, RBF and REAL-X, and their figures.

    python benchmarks/selector.py shapes --arch resnet20 --pretrained-weights f.pth.tar --work-dir DIR \\
        [--kinds rbf real-x] [--output FILE.json]

Everything goes through `python -m explainers`. Figures are over the whole validation split, which nothing was chosen
by: KL, agreement and area of the masks without noise, how often their highest pixel lies on the object, ROC-AUC; and
the pointing game beside Grad-CAM and the picture's centre on the pictures that the network gets right. A run that is
finished in DIR is not repeated, an interrupted one continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from image_classification.environment import describe_environment
from image_classification.report import read_report

COLUMNS = ("agreement", "kl", "area", "on_object", "within_object", "auc", "width")


def explain(verb: str, *words: str) -> None:
    """One verb of `python -m explainers`; an error ends the script."""
    command = [sys.executable, "-m", "explainers", verb, *words]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def train(verb: str, workspace: Path, arguments: argparse.Namespace, *words: str) -> float:
    """Train unless it was done before; seconds, over all invocations."""
    note = workspace / "seconds.json"
    done = json.loads(note.read_text()) if note.is_file() else {"finished": False, "seconds": 0.0}
    if not done["finished"]:
        begin = time.perf_counter()
        explain(
            verb, arguments.data, "--arch", arguments.arch, "--pretrained-weights", str(arguments.pretrained_weights),
            "--lr-schedule", "cosine", "--workspace", str(workspace), "--resume", "auto", "--seed", str(arguments.seed),
            *words, *arguments.flags.split(),
        )  # fmt: skip
        done = {"finished": True, "seconds": done["seconds"] + time.perf_counter() - begin}
        note.write_text(json.dumps(done))
    return float(done["seconds"])


def run_kind(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Predictor, selector and figures of one kind of masks."""
    folder = arguments.work_dir / kind
    predictor, selector = folder / "predictor", folder / "selector"
    seconds = {
        "predictor": train(
            "train-predictor", predictor, arguments, "--selector-type", kind, "-b", "64",
            "--epochs", str(arguments.predictor_epochs), "--lr", str(arguments.predictor_lr),
            "--evaluation-interval", "200",
        )
    }  # fmt: skip
    judge = predictor / "model_best.pth.tar"
    seconds["selector"] = train(
        "train-selector", selector, arguments, "--predictor", str(judge), "-b", "16",
        "--epochs", str(arguments.selector_epochs), "--lr", str(arguments.selector_lr),
    )  # fmt: skip
    best = selector / "model_best.pth.tar"
    figures, page = folder / "figures.json", folder / "masks.png"
    explain(
        "evaluate-selector", arguments.data, "--selector", str(best), "--predictor", str(judge), "--json", str(figures),
    )  # fmt: skip
    explain("visualize", arguments.data, "--selector", str(best), "--predictor", str(judge), "-o", str(page))
    localized = folder / "localized.json"
    explain(
        "localize", arguments.data, "--checkpoint", str(arguments.pretrained_weights), "--method", "selector",
        "--method", "gradcam", "--method", "centre", "--selector", str(best), "--metric", "point", "--metric", "auc",
        "--json", str(localized),
    )  # fmt: skip
    rows = json.loads(localized.read_text())["rows"]
    chosen = {
        "predictor": torch.load(judge, weights_only=True),
        "selector": torch.load(best, weights_only=True),
    }
    return {
        "epochs": {name: payload["config"]["epochs"] for name, payload in chosen.items()},
        "seconds": seconds,
        "chosen_by": {name: payload["callbacks"][name]["figures"] for name, payload in chosen.items()},
        "validation": json.loads(figures.read_text())["figures"],
        "course": course(selector / "experiment_raport.json"),
        "pointing_game": {row["method"]: row["figures"] | row["counts"] for row in rows},
    }


def course(report: Path) -> list[dict[str, float]]:
    """Validation figures after every epoch of the selector's training."""
    rows = [row["data"] for row in read_report(report) if row["type"] == "LOG"]
    return [row for row in rows if "val.agreement" in row]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--pretrained-weights", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["rbf", "real-x"], choices=["rbf", "real-x"])
    parser.add_argument("--predictor-epochs", type=int, default=12)
    parser.add_argument("--predictor-lr", type=float, default=5e-4)
    parser.add_argument("--selector-epochs", type=int, default=8)
    parser.add_argument("--selector-lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of both training verbs, in one word")
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    """Run, print the table, write the JSON."""
    arguments = parse()
    arguments.pretrained_weights = arguments.pretrained_weights.resolve()
    arguments.work_dir = arguments.work_dir.resolve()
    results = {kind: run_kind(kind, arguments) for kind in arguments.kinds}
    print(f"\n{'masks':<8}" + "".join(f"{name:>15}" for name in COLUMNS) + f"{'seconds':>10}")
    for kind, result in results.items():
        values = [f"{result['validation'].get(name, float('nan')):15.3f}" for name in COLUMNS]
        print(f"{kind:<8}" + "".join(values) + f"{sum(result['seconds'].values()):10.0f}")
    if arguments.output is not None:
        settings = {
            key: value
            for key, value in vars(arguments).items()
            if key not in ("output", "work_dir") and "epochs" not in key
        }
        settings["pretrained_weights"] = arguments.pretrained_weights.name
        content = {"environment": describe_environment(), "n": 1, "settings": settings, "results": results}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
