"""Train, prune, fine-tune or evaluate a network:  python main.py DATA [flags]  (see --help and README.md)."""

from __future__ import annotations

from image_classification.exit_codes import answer_signals_while_importing

if __name__ == "__main__":
    answer_signals_while_importing()

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from image_classification.extras import MissingPackageError
from image_classification.lazy import lazy_names

if TYPE_CHECKING:
    from pruning.training.main_job import MainConfig, run

__all__ = ["MainConfig", "main", "run"]
_JOB = "pruning.training.main_job"
__getattr__ = lazy_names(__name__, {"MainConfig": _JOB, "run": _JOB})

DESCRIPTION = (
    "Train, prune, fine-tune and evaluate image classifiers on folders, CIFAR, VOC or the embedded shapes."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from image_classification.flag_lists import answer

        answer(f"{_JOB}:TRAIN", words, "main.py", DESCRIPTION)
        from pruning.training.main_job import TRAIN
    except MissingPackageError as error:
        sys.exit(f"error: {error}")
    return TRAIN.run(TRAIN.parse(words, "main.py", DESCRIPTION))


if __name__ == "__main__":
    sys.exit(main())
