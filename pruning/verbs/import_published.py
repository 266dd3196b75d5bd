"""`python -m pruning import FILE OUT`: converts published checkpoints to LucidPrune checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from image_classification.file_writing import output_path
from image_classification.verbs import declared
from pruning.files.importing import FORMATS, import_checkpoint
from pruning.files.importing.imported import arch_of


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("file", type=Path, help="a file of one of the published programs")
    parser.add_argument(
        "out",
        type=output_path,
        help="where the classifier goes; predictor, selector and encoder get names beside it",
    )
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default=None, help="default: guessed from the names in the file"
    )
    parser.add_argument(
        "--classifier",
        type=Path,
        default=None,
        metavar="FILE",
        help="LucidPrune checkpoint with the classifier of a selector, for files that hold the selector alone",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="open a file that holds more than tensors and plain values; this runs whatever code is in it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    imported = import_checkpoint(
        arguments.file,
        arguments.format,
        trust_pickle=arguments.trust_pickle,
        classifier=arguments.classifier,
    )
    for role, path in imported.save(arguments.out).items():
        network = imported.networks.get(role)
        what = f"selector of a {imported.selector_arch}" if network is None else f"{role}, {arch_of(network)}"
        what += " with a saliency mapping" if imported.casm is not None and role == "classifier" else ""
        print(f"{path}: {what} ({imported.format})")
    for remark in imported.remarks:
        print(f"note: {remark}")
    return 0


VERB = declared(declare, run)
