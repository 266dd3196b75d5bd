"""Train, prune, fine-tune or evaluate a network:  python main.py DATA [flags]  (see --help and README.md)."""

from __future__ import annotations

from image_classification.exit_codes import answer_signals_while_importing

if __name__ == "__main__":
    answer_signals_while_importing()

import sys

from image_classification.extras import MissingPackageError

try:
    from pruning.training.main_job import MainConfig, main, run
except MissingPackageError as error:
    sys.exit(f"error: {error}")

__all__ = ["MainConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
