"""Verbs of `python -m pruning`, one per file."""

from image_classification.extras import need

need("rich", "PIL", "yaml")
