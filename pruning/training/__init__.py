"""Pruning as a part of a training job: the only wing that knows the trainer, its callbacks and flags."""
