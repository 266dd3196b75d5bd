"""`python -m explainers VERB …`: the command line of the explanation tools."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from image_classification.verbs import run_verb

VERBS = {
    "attribute": ("explainers.verbs.attribute", "heat-maps as images and .npy, and pages of them"),
    "classify": (
        "explainers.verbs.classify",
        "class names and probabilities of image files, with heat-maps: IMAGE…",
    ),
    "localize": (
        "explainers.verbs.localize",
        "pointing game, ROC-AUC, box figures: methods × networks in one table",
    ),
    "train-casm": ("explainers.casm.train", "train a classifier-agnostic saliency mapping (CASM)"),
    "score-casm": (
        "explainers.casm.score",
        "how well saliency mappings find objects: F1, F1a, LE, OM, statistics",
    ),
    "eval-casm": (
        "explainers.casm.eval_casm",
        "what classifiers make of masked-in, masked-out and inpainted images",
    ),
    "plot-casm": ("explainers.casm.plot", "pages of images and their masks"),
    "compare": (
        "explainers.verbs.compare_maps",
        "what compression did to a network's predictions and maps: ORIGINAL PRUNED DATA",
    ),
    "train-predictor": (
        "explainers.aem.train_predictor",
        "a copy of a network learns to imitate it on masked images (for train-selector)",
    ),
    "train-selector": (
        "explainers.aem.train_selector",
        "a selector learns which part of an image a network needs",
    ),
    "evaluate-selector": (
        "explainers.aem.evaluate_selector",
        "KL, agreement, area of a selector's masks, and whether they lie on objects",
    ),
    "visualize": ("explainers.aem.visualize", "images, a selector's masks, masked images: one page"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status: 2 for unusable input, `EXIT_PEER` if another rank failed."""
    return run_verb(VERBS, argv, prog="python -m explainers", description="What networks look at.")


if __name__ == "__main__":
    sys.exit(main())
