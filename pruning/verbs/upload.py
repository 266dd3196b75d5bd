"""`python -m pruning upload CHECKPOINT OWNER/NAME`: uploads a network to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from image_classification.command_parser import positive
from image_classification.config import ConfigError, check
from image_classification.file_writing import output_path
from image_classification.models import model_for_weights
from image_classification.plain_data import Plain
from image_classification.small_files import problem_of, read_json
from image_classification.verbs import declared
from pruning.report.hub import check_repository, prepare, upload
from pruning.verbs.images import declare_ema, size_of


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=Path, help="network, pruned or not; the training in it stays here")
    parser.add_argument("repository", metavar="OWNER/NAME", help="on the Hub; made if it is not there")
    parser.add_argument(
        "--report",
        type=Path,
        default=None,
        metavar="FILE",
        help="report.html of the run: its figures go into the card, and the page beside it",
    )
    parser.add_argument("--license", default=None, metavar="ID", help="of the weights, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    parser.add_argument(
        "--folder",
        type=output_path,
        default=None,
        metavar="DIR",
        help="write what would be uploaded there, and upload nothing",
    )
    declare_ema(parser)
    parser.add_argument(
        "--image-size", type=positive, default=None, help="side of the images; default: the network's"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the files, upload them, and print their address."""
    check_repository(arguments.repository)
    check(
        not (arguments.private and arguments.folder),
        "--private has no effect with --folder, which uploads nothing: leave one out",
    )
    report = None if arguments.report is None else _report(arguments.report)
    model = model_for_weights(
        None, arguments.checkpoint, image_size=arguments.image_size, ema=arguments.ema
    ).eval()
    image_size = size_of(model, arguments.image_size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        files = prepare(
            folder,
            model,
            arguments.repository,
            image_size=image_size,
            license=arguments.license,
            report=report,
        )
        if arguments.folder is not None:
            print(f"wrote {', '.join(files)} to {folder}; nothing was uploaded")
        else:
            print(
                f"uploaded {', '.join(files)} to {upload(folder, arguments.repository, private=arguments.private)}"
            )
    return 0


def _report(page: Path) -> tuple[Plain, Path]:
    """Load the content and page of a report.

    Raises:
        ConfigError: There is no report, or it is of another kind.
    """
    path = page.with_suffix(".json")
    for file in (page, path):
        problem = problem_of(file)
        check(
            problem is None,
            f"--report {page}: {file.name} {problem}; `python -m pruning report RUN` writes both",
        )
    content = read_json(path, f"--report {page}:")
    wanted = {"accuracy", "config", "costs", "budget", "network"}
    if not (isinstance(content, dict) and wanted <= content.keys()):
        raise ConfigError(
            f"--report {page}: {path.name} is not a LucidPrune report; `python -m pruning report RUN` writes one"
        )
    return content, page


VERB = declared(declare, run)
