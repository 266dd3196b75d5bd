"""`python -m image_classification VERB …`: jobs on data sets and networks other than training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from image_classification.verbs import run_verb

VERBS = {
    "verify": ("image_classification.data.verify", "decode every image and name what is broken"),
    "prepare": ("image_classification.data.prepare", "write a copy with images resized to a short side"),
    "split": ("image_classification.data.split", "make train/ and val/ of class folders, by links"),
    "benchmark": (
        "image_classification.inference_speed",
        "latency and throughput of inference over batch sizes",
    ),
    "throughput": (
        "image_classification.throughput",
        "images per second of training over processes, backends and precisions",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status: 0 on success, 1 if images are broken, 2 if the job could not be done."""
    return run_verb(
        VERBS, argv, prog="python -m image_classification", description="Jobs on data sets and networks."
    )


if __name__ == "__main__":
    sys.exit(main())
