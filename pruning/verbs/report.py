"""`python -m pruning report RUN`: writes the report of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from explainers.attribution.method import method_names
from image_classification.config import check
from image_classification.device_flag import declare_device, device_named
from image_classification.extras import need
from image_classification.file_writing import output_path, write_text
from image_classification.plain_data import PlainValue
from image_classification.verbs import declared
from pruning.report.content import PARTS, Settings, collect
from pruning.report.page import render


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "run",
        type=Path,
        help="workspace of a run, or a folder of workspaces of which one continues the other",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=output_path,
        default=None,
        metavar="FILE",
        help="HTML file, with the JSON beside it; default: RUN/report.html",
    )
    parser.add_argument(
        "--original",
        type=Path,
        default=None,
        metavar="FILE",
        help="the network before pruning; default: the one that pruning started from",
    )
    parser.add_argument("--data", default=None, help="data set, where the run's has moved")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="what not to measure")
    parser.add_argument(
        "--method",
        "-m",
        nargs="+",
        choices=method_names(),
        default=list(Settings.methods),
        help="attribution methods",
    )
    parser.add_argument(
        "--num-images",
        "--num-pictures",
        "-n",
        type=int,
        default=Settings.num_images,
        help="images that maps are compared on",
    )
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=list(Settings.batch_sizes),
        metavar="N",
        help="of the speed figures",
    )
    parser.add_argument(
        "--num-batches",
        type=int,
        default=Settings.num_batches,
        help="batches timed, per network and batch size",
    )
    declare_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Collect, measure and write the report; print the path of the page."""
    need("jinja2", "scipy", "torchmetrics")  # before anything is measured
    check(arguments.num_images >= 1, f"--num-images {arguments.num_images}: give at least 1")
    check(min(arguments.batch_sizes) >= 1, f"--batch-sizes {arguments.batch_sizes}: each must be at least 1")
    check(arguments.num_batches >= 1, f"--num-batches {arguments.num_batches}: give at least 1")
    page = arguments.output or arguments.run / "report.html"
    check(page.suffix != ".json", f"--output {page}: the page is HTML; the JSON goes beside it")
    settings = Settings(
        original=arguments.original,
        data=arguments.data,
        skip=arguments.skip,
        methods=tuple(dict.fromkeys(arguments.method)),
        num_images=arguments.num_images,
        batch_sizes=arguments.batch_sizes,
        num_batches=arguments.num_batches,
        device=device_named(arguments.device),
    )
    content = collect(arguments.run, settings)
    write_text(page, render(content))
    write_text(page.with_suffix(".json"), json.dumps(_sound(content.plain), indent=2, allow_nan=False) + "\n")
    print(f"wrote {page} and {page.with_suffix('.json').name}")
    return 0


def _sound(value: PlainValue) -> PlainValue:
    """Replace NaN, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {str(key): _sound(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sound(entry) for entry in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value


VERB = declared(declare, run)
