"""`python -m explainers VERB …`: what networks look at, from the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from explainers.record import UnsupportedOperatorError
from image_classification.distributed import EXIT_PEER, peer_loss
from image_classification.models.registry import nearest

# Verb → module with `main(argv) -> exit status`, and what it does. A module is imported only for its own verb.
VERBS = {
    "attribute": ("explainers.attribute", "heat-maps as pictures and .npy, and pages of them"),
    "localize": (
        "explainers.localize",
        "pointing game, ROC-AUC, box figures: methods × networks in one table",
    ),
    "train-casm": ("explainers.casm.train", "train a classifier-agnostic saliency mapping (CASM)"),
    "score-casm": (
        "explainers.casm.score",
        "how well saliency mappings find objects: F1, F1a, LE, OM, statistics",
    ),
    "eval-casm": (
        "explainers.casm.evaluate",
        "what classifiers make of masked-in, masked-out and inpainted pictures",
    ),
    "plot-casm": ("explainers.casm.plot", "pages of pictures and their masks"),
    "compare": (
        "explainers.compare",
        "what compression did to a network's predictions and maps: ORIGINAL PRUNED DATA",
    ),
    "train-predictor": (
        "explainers.aem.train_predictor",
        "a copy of a network learns to imitate it on masked pictures (for train-selector)",
    ),
    "train-selector": (
        "explainers.aem.train_selector",
        "a selector learns which part of a picture a network needs",
    ),
    "evaluate-selector": (
        "explainers.aem.evaluate_selector",
        "KL, agreement, area of a selector's masks, and whether they lie on objects",
    ),
    "visualize": ("explainers.aem.visualize", "pictures, a selector's masks, masked pictures: one page"),
}


def usage() -> str:
    """The list of verbs."""
    lines = [f"  {verb:<18} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: python -m explainers VERB …", "", "verbs (each has --help):", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit status, 2 for anything unusable, `EXIT_PEER` where another rank failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in VERBS:
        print(f"unknown verb {words[0]!r}{nearest(words[0], VERBS)}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[words[0]][0])
    try:
        return int(module.main(words[1:]))
    except (ValueError, FileNotFoundError, UnsupportedOperatorError) as error:
        # Messages for people, each naming the flag, the value and the way out.
        print(f"python -m explainers {words[0]}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        lost = peer_loss(error)
        if lost is None:
            raise
        print(f"python -m explainers {words[0]}: error: {lost}", file=sys.stderr)
        return EXIT_PEER


if __name__ == "__main__":
    sys.exit(main())
