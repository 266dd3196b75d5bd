"""Verbs of `python -m pruning` that have a file of their own."""
