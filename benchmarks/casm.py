"""Trains saliency mappings (CASM) from one classifier with several thinning presets, and judges them.

    OMP_NUM_THREADS=1 python benchmarks/casm.py --checkpoint runs/shapes/model_best.pth.tar --workspace runs/casm

Per preset: F1, F1a, LE, OM, saliency metric and mask statistics beside `max` and `centre` (`score-casm`), and accuracy,
loss and entropy, on whole, masked-in, masked-out and inpainted pictures, of the mapping's own classifier and of the one
that it started from, beside masks that know no picture (`eval-casm`).

λ_r weighs the size of masks against an entropy, whose largest value is the logarithm of the number of classes. The
published values belong to 1,000 classes; `--lambda-scale auto` multiplies them by ln(classes) ÷ ln(1000).

Another run with the same workspace continues trainings that were interrupted, and does not repeat finished ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from explainers.casm import evaluate, score, train
from explainers.casm.presets import PRESETS
from image_classification.environment import describe_environment
from image_classification.models import load_weights

RESULTS = Path(__file__).resolve().parent / "results"


def run_preset(name: str, scale: float, words: argparse.Namespace, arch: str) -> dict[str, Any]:
    """Train a mapping, or finish its training."""
    weight = PRESETS[name].lambda_entropy * scale
    called = name if scale == 1 else f"{name}-scaled"
    command = [
        words.data, "--casms-path", str(words.workspace / "casms"), "--name", called, "--reproduce", name,
        "--lambda-r", str(weight), "--arch", arch, "--pretrained-weights", str(words.checkpoint),
        "--epochs", str(words.epochs), "--lrde", str(words.lrde), "--pot", str(words.pot),
        "--lr-casm", str(words.lr_casm), "--decoder-width", str(words.decoder_width), "--seed", str(words.seed),
        "--device", words.device, "--workers", str(words.workers), "--resume", "auto", "--checkpoint-interval", "50",
        *(["--amp"] if words.amp else []),
    ]  # fmt: skip
    begin = time.perf_counter()
    status = train.main(command)
    if status != 0:
        raise SystemExit(status)
    return {"casm": called, "preset": name, "lambda_r": weight, "seconds": time.perf_counter() - begin}


def judge(words: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `score-casm` and of `eval-casm` for all mappings in the workspace."""
    started_from = words.workspace / "started_from"
    started_from.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(words.checkpoint, started_from / "start.pth.tar")
    common = [
        words.data, "--casms-path", str(words.workspace / "casms"), "--device", words.device,
        "--workers", str(words.workers),
    ]  # fmt: skip
    files = {name: words.workspace / f"{name}.json" for name in ("score", "eval")}
    for main, name, extra in (
        (score.main, "score", []), (evaluate.main, "eval", ["--resnets-path", str(started_from)]),
    ):  # fmt: skip
        status = main([*common, *extra, "--json", str(files[name])])
        if status != 0:
            raise SystemExit(status)
    found, classified = (json.loads(path.read_text(encoding="utf-8"))["rows"] for path in files.values())
    return found, classified


def main() -> None:
    """Train, judge, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="shapes")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="classifier to start from, a checkpoint of ours"
    )
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", default=["F", "L", "L100"], choices=tuple(PRESETS))
    parser.add_argument(
        "--published-lambda", nargs="*", default=["L"], choices=tuple(PRESETS), help="also unscaled"
    )
    parser.add_argument("--lambda-scale", default="auto", help="factor on the published λ_r, or auto")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lrde", type=int, default=4)
    parser.add_argument("--pot", type=float, default=1.0)
    parser.add_argument("--lr-casm", type=float, default=3e-3)
    parser.add_argument("--decoder-width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "casm_shapes.json")
    words = parser.parse_args()
    weights = load_weights(words.checkpoint)
    if weights.structure is None or weights.arch is None or weights.structure.num_classes is None:
        parser.error(
            f"--checkpoint {words.checkpoint}: give a checkpoint of ours, which says its architecture"
        )
    automatic = math.log(weights.structure.num_classes) / math.log(1000)
    scale = automatic if words.lambda_scale == "auto" else float(words.lambda_scale)
    runs = [(name, scale) for name in words.presets] + [(name, 1.0) for name in words.published_lambda]
    trained = [run_preset(name, factor, words, weights.arch) for name, factor in runs]
    found, classified = judge(words)
    report = {
        "trained": trained,
        "score": found,
        "eval": classified,
        "settings": {
            key: str(value) for key, value in vars(words).items() if key not in ("json", "workspace")
        },
        "lambda_scale": scale,
        "num_runs": 1,
        "environment": describe_environment(torch.device(words.device)),
    }
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {words.json}")


if __name__ == "__main__":
    main()
