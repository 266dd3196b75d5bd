"""Pruning as part of a training job: the only subpackage that knows the trainer, its callbacks and flags."""
