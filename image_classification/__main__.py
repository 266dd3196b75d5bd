"""`python -m image_classification VERB …`: jobs on data sets and networks beside training.

verify DIR                            decode every picture, name what is broken
prepare DIR OUT --short-side 256      write a copy with smaller pictures
benchmark --arch NAME                 latency and throughput of inference over batch sizes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from image_classification import inference_speed
from image_classification.data.prepare import PrepareConfig, prepare
from image_classification.data.verify import Broken, verify
from image_classification.verbs import Verb, run_verb

_SHOWN = 50


def _declare_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="directory of pictures, any folders in it included")
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="processes; one per core by default, 0 for none beside this one",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _declare_verify(parser: argparse.ArgumentParser) -> None:
    _declare_common(parser)
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the report there as well"
    )


def _run_verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.directory, num_workers=arguments.workers, progress=not arguments.quiet)
    if arguments.json is not None:
        report.save(arguments.json)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items())
    print(f"{report.num_pictures:,} pictures, {len(report.broken):,} broken ({kinds or 'none whole'})")
    _print_broken(report.broken)
    return report.exit_code


def _declare_prepare(parser: argparse.ArgumentParser) -> None:
    _declare_common(parser)
    parser.add_argument("output", type=Path, help="directory of the copy")
    parser.add_argument(
        "--short-side",
        type=int,
        default=PrepareConfig.short_side,
        metavar="PIXELS",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=PrepareConfig.quality,
        help="JPEG quality, 1 to 100; default: %(default)s",
    )


def _run_prepare(arguments: argparse.Namespace) -> int:
    report = prepare(
        arguments.directory,
        arguments.output,
        PrepareConfig(short_side=arguments.short_side, quality=arguments.quality),
        num_workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(
        f"{report.num_resized:,} resized, {report.num_converted:,} converted to RGB, {report.num_copied:,} copied, "
        f"{report.num_kept:,} kept from an earlier run, {len(report.broken):,} broken"
    )
    _print_broken(report.broken)
    return report.exit_code


def _print_broken(broken: Sequence[Broken]) -> None:
    for entry in broken[:_SHOWN]:
        print(f"  {entry.path}: {entry.reason}")
    if len(broken) > _SHOWN:
        print(f"  … and {len(broken) - _SHOWN:,} more")


VERBS = {
    "verify": Verb("decode every picture and name what is broken", _declare_verify, _run_verify),
    "prepare": Verb("write a copy with pictures resized to a short side", _declare_prepare, _run_prepare),
    "benchmark": Verb(
        "latency and throughput of inference over batch sizes", inference_speed.declare, inference_speed.run
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is 0 if all is well, 1 if pictures are broken, 2 if the job could not be done."""
    return run_verb(
        VERBS, arguments, prog="python -m image_classification", description="Jobs on data sets and networks."
    )


if __name__ == "__main__":
    sys.exit(main())
