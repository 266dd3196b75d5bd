"""`python -m pruning report RUN`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from explainers.base import method_names
from image_classification.config import check
from pruning.report.content import PARTS, Settings, collect
from pruning.report.page import render


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "run",
        type=Path,
        help="workspace of a run, or a folder of workspaces of which one continues the other",
    )
    parser.add_argument(
        "--output", "-o", type=Path, default=None, metavar="FILE",
        help="HTML file, with the JSON beside it; default: RUN/report.html",
    )  # fmt: skip
    parser.add_argument(
        "--original", type=Path, default=None, metavar="FILE",
        help="the network before pruning; default: the one that pruning started from",
    )  # fmt: skip
    parser.add_argument("--data", default=None, help="data set, where the run's has moved")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="what not to measure")
    parser.add_argument(
        "--method", "-m", nargs="+", choices=method_names(), default=["gradcam"], help="attribution methods"
    )
    parser.add_argument(
        "--num-pictures", "-n", type=int, default=200, help="pictures that maps are compared on"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 32], metavar="N", help="of the speed figures"
    )
    parser.add_argument(
        "--num-batches", type=int, default=30, help="batches timed, per network and batch size"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(arguments: argparse.Namespace) -> int:
    """Collect, measure, write; prints the path of the page."""
    check(arguments.num_pictures >= 1, f"--num-pictures {arguments.num_pictures}: give at least 1")
    check(min(arguments.batch_sizes) >= 1, f"--batch-sizes {arguments.batch_sizes}: each must be at least 1")
    check(arguments.num_batches >= 1, f"--num-batches {arguments.num_batches}: give at least 1")
    page = arguments.output or arguments.run / "report.html"
    check(page.suffix != ".json", f"--output {page}: the page is HTML; the JSON goes beside it")
    settings = Settings(
        original=arguments.original,
        data=arguments.data,
        skip=arguments.skip,
        methods=tuple(dict.fromkeys(arguments.method)),
        num_pictures=arguments.num_pictures,
        batch_sizes=arguments.batch_sizes,
        num_batches=arguments.num_batches,
        device=torch.device(arguments.device),
    )
    content = collect(arguments.run, settings)
    _write(page, render(content))
    _write(page.with_suffix(".json"), json.dumps(_sound(content.plain), indent=2, allow_nan=False) + "\n")
    print(f"wrote {page} and {page.with_suffix('.json').name}")
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _sound(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {str(key): _sound(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sound(entry) for entry in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
