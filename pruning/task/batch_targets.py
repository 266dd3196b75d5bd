"""Targets of calibration batches, and their kinds of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from image_classification.models.running import Outputs
from pruning.task.batches import Batch, named_parts

#: The targets in a batch; None if it has none.
Targets = Any
TargetKind = Literal["classes", "pixels"]

TARGET_NAMES = ("labels", "label", "targets", "target", "mask")


def targets_of(batch: Batch) -> Outputs:
    """Return the targets of a batch: the second item, or the entry called labels, targets or similar; None without
    targets.
    """
    if isinstance(batch, Tensor):
        return None
    if not isinstance(batch, Iterable):
        batch = named_parts(batch)
    if isinstance(batch, Mapping):
        return _one_dimensional(next((batch[name] for name in TARGET_NAMES if name in batch), None))
    items = batch if isinstance(batch, Sequence) else tuple(batch)
    return _one_dimensional(items[1]) if len(items) > 1 else None


def _one_dimensional(targets: Targets) -> Targets:
    """Return (N, 1) class numbers as (N,); a second dimension would be taken for shares of classes."""
    if isinstance(targets, Tensor) and targets.dim() == 2 and targets.shape[1] == 1 and _is_whole(targets):
        return targets.squeeze(1)
    return targets


def _is_whole(targets: Tensor) -> bool:
    return not targets.is_floating_point() and not targets.is_complex()


def kind_of_targets(targets: Targets) -> TargetKind | None:
    """Return the kind of class targets: of samples, (N,) integers or (N, L) shares, or of positions; None: no
    classes.
    """
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        return None
    whole = _is_whole(targets)
    if targets.dim() == 1:
        return "classes" if whole else None
    if targets.dim() == 2:
        shares = whole or bool(((targets >= 0) & (targets <= 1)).all())
        return "classes" if shares else None
    return "pixels" if class_map(targets) is not None else None


def class_map(targets: Tensor) -> Tensor | None:
    """Return class indices of positions, (N, H, W) or with other dimensions; None if targets are not such a map.

    Args:
        targets: (N, …) or (N, 1, …) integers of any type, or (N, L, …) one-hot or soft.
    """
    if targets.dim() < 3:
        return None
    if targets.dim() > 3 and targets.shape[1] == 1:
        targets = targets.squeeze(1)
    if not targets.is_floating_point():
        return targets.long()
    if targets.dim() > 3 and targets.shape[1] > 1:
        shares = bool(((targets >= 0) & (targets <= 1)).all()) and bool(
            (targets.sum(1) - 1).abs().max() < 1e-3
        )
        return targets.argmax(1) if shares else None
    return targets.long() if bool((targets == targets.round()).all()) else None
