"""Trains saliency mappings (CASM) of one classifier with several thinning presets, and evaluates them.

    OMP_NUM_THREADS=1 python benchmarks/casm.py --checkpoint runs/shapes/model_best.pth.tar --workspace runs/casm

For every preset the JSON has the tables of two verbs, which also print them:

score-casm   F1, F1a, LE, OM, saliency metric and statistics of the masks, beside the baselines `max` and `centre`
eval-casm    accuracy, loss and entropy on whole, masked-in, masked-out and inpainted images, of the mapping's own
classifier and of the one it started from, along with masks that do not depend on the image

λ_r weighs the size of the masks against an entropy of at most ln(classes). The published values belong to 1,000
classes; `--lambda-scale auto` multiplies them by ln(classes) ÷ ln(1000).

A second run with the same workspace continues interrupted trainings and does not repeat finished ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

from common.report import BenchmarkParser, write_json

from explainers.__main__ import main as explain
from explainers.casm.presets import PRESETS
from image_classification.models import load_weights


def run_verb(verb: str, words: list[str]) -> None:
    """Run a verb of `python -m explainers` in this process; a failure ends the benchmark."""
    status = explain([verb, *words])
    if status:
        raise SystemExit(status)


def run_preset(preset: str, scale: float, arguments: argparse.Namespace, arch: str) -> dict[str, str | float]:
    """Train a mapping, or finish its training."""
    weight = PRESETS[preset].lambda_entropy * scale
    name = preset if scale == 1 else f"{preset}-scaled"
    command = [arguments.data, "--casms-path", str(arguments.workspace / "casms"), "--name", name]
    command += ["--reproduce", preset, "--lambda-r", str(weight), "--resume", "auto"]
    command += ["--arch", arch, "--pretrained-weights", str(arguments.checkpoint)]
    for flag in ("epochs", "lrde", "pot", "lr_casm", "decoder_width", "seed", "device", "workers"):
        command += ["--" + flag.replace("_", "-"), str(getattr(arguments, flag))]
    command += ["--checkpoint-interval", "50"]
    if arguments.amp:
        command.append("--amp")
    begin = time.perf_counter()
    run_verb("train-casm", command)
    return {"casm": name, "preset": preset, "lambda_r": weight, "seconds": time.perf_counter() - begin}


def judge(arguments: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Return rows of `score-casm` and of `eval-casm` for all mappings in the workspace."""
    started_from = arguments.workspace / "started_from"
    started_from.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.checkpoint, started_from / "start.pth.tar")
    common = [arguments.data, "--casms-path", str(arguments.workspace / "casms")]
    common += ["--device", str(arguments.device), "--workers", str(arguments.workers)]
    scores = arguments.workspace / "score.json"
    run_verb("score-casm", [*common, "--json", str(scores)])
    classified = arguments.workspace / "eval.json"
    run_verb("eval-casm", [*common, "--resnets-path", str(started_from), "--json", str(classified)])
    return {"score": read_rows(scores), "eval": read_rows(classified)}


def read_rows(path: Path) -> list[dict[str, object]]:
    """Read the rows that a verb wrote."""
    rows: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__)
    parser.add_argument("data", nargs="?", default="shapes")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="classifier to start from, a LucidPrune checkpoint"
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
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--amp", action="store_true")
    small = {"data": "shapes:train=160,val=24", "presets": ["L"], "published_lambda": [], "epochs": 1}
    return parser.parse("casm_shapes.json", quick={**small, "decoder_width": 4})


def main() -> None:
    """Train, evaluate, print and write JSON."""
    arguments = parse()
    weights = load_weights(arguments.checkpoint)
    if weights.structure is None or weights.arch is None or weights.structure.num_classes is None:
        raise SystemExit(
            f"--checkpoint {arguments.checkpoint}: give a LucidPrune checkpoint, which says its architecture"
        )
    if arguments.lambda_scale == "auto":
        scale = math.log(weights.structure.num_classes) / math.log(1000)
    else:
        scale = float(arguments.lambda_scale)
    trained = [run_preset(name, scale, arguments, weights.arch) for name in arguments.presets]
    trained += [run_preset(name, 1.0, arguments, weights.arch) for name in arguments.published_lambda]
    write_json(arguments, 1, {"trained": trained, **judge(arguments), "lambda_scale": scale})


if __name__ == "__main__":
    main()
