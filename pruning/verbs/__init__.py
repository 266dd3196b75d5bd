"""Verbs of `python -m pruning` that have a file of their own."""

from image_classification.extras import need

need("rich", "PIL", "yaml")
