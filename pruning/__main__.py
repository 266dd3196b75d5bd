"""`python -m pruning VERB …`: plans and inspects pruning, and imports and exports networks.

`lucidprune VERB …` offers everything in the packages under one command: these verbs, those of `python -m
image_classification` and (under `explain`) those of `python -m explainers`, `main.py` and `multiproc.py`, which all
remain available on their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from explainers.__main__ import VERBS as EXPLAIN_VERBS
from image_classification.__main__ import VERBS as DATA_VERBS
from image_classification.verbs import Verbs, run_verb

VERBS = {
    "groups": ("pruning.verbs.list_groups", "list the coupled channel groups of a network: ARCH"),
    "score": (
        "pruning.verbs.score_channels",
        "score the channels of a network on a data set: CHECKPOINT DATA",
    ),
    "compress": (
        "pruning.verbs.compress",
        "make a trained network smaller in minutes, without training: CHECKPOINT IMAGES",
    ),
    "sensitivity": (
        "pruning.verbs.measure_sensitivity",
        "how far the outputs move when one channel group is narrowed: CHECKPOINT IMAGES",
    ),
    "report": ("pruning.verbs.report", "everything about a run in one HTML file: RUN"),
    "export": (
        "pruning.verbs.export",
        "write a network as ONNX, torch.export or plain state dict: CHECKPOINT",
    ),
    "upload": (
        "pruning.verbs.upload",
        "put a network on the Hugging Face Hub, with a card: CHECKPOINT OWNER/NAME",
    ),
    "compare": (
        "pruning.verbs.compare_networks",
        "costs, widths and accuracy of networks side by side: FIRST SECOND …",
    ),
    "import": (
        "pruning.verbs.import_published",
        "turn published checkpoints into LucidPrune checkpoints: FILE OUT",
    ),
    "shrink": ("pruning.verbs.shrink", "cut away what a masked network has no use for: CHECKPOINT OUT"),
}

_JOB = "pruning.training.main_job"
#: Verbs of `lucidprune`. The first three are the same job with different defaults.
ALL_VERBS: Verbs = {
    "train": (f"{_JOB}:TRAIN", "train or fine-tune a network on a data set: DATA"),
    "prune": (f"{_JOB}:PRUNE", "train a network while its channels leave, to a budget: DATA"),
    "evaluate": (f"{_JOB}:EVALUATE", "accuracy of a network on the validation images: DATA"),
    **VERBS,
    **DATA_VERBS,
    "launch": ("image_classification.launch", "run a command once per GPU, on one node or many"),
    "explain": ("explainers.__main__", "heat-maps and their figures; has verbs of its own"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status: 0, or 2 if the job could not be done."""
    return run_verb(
        VERBS, argv, prog="python -m pruning", description="What pruning would do, and what it did."
    )


def lucidprune(argv: Sequence[str] | None = None) -> int:
    """Run a verb of any package and return its exit status, or 2 if the job could not be done."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        from image_classification.completion import complete

        complete("lucidprune", ALL_VERBS, {"explain": EXPLAIN_VERBS})
    if words[:1] == ["explain"]:
        description = "What networks look at."
        return run_verb(EXPLAIN_VERBS, words[1:], prog="lucidprune explain", description=description)
    return run_verb(
        ALL_VERBS, words, prog="lucidprune", description="Train, prune, explain and ship vision networks."
    )


if __name__ == "__main__":
    sys.exit(main())
