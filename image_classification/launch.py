"""`lucidprune launch`: one training process per GPU. The flags are torchrun's; `launching` has the implementation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from image_classification.exit_codes import answer_signals_while_importing
from image_classification.verbs import Verb


def parse(argv: Sequence[str], prog: str, description: str) -> argparse.Namespace:
    """Parse the command line as torchrun does. From here on, a signal ends this process with the exit code of a job."""
    answer_signals_while_importing()
    from image_classification import launching

    return launching.parse(list(argv), prog)


def run(arguments: argparse.Namespace) -> int:
    """Launch the job and return its exit code."""
    from image_classification import launching

    return launching.run(arguments)


VERB = Verb(parse, run)
