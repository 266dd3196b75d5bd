"""Targets of calibration batches, and what kind of classes they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from image_classification.models.running import Outputs
from pruning.task.batches import Batch

#: What a batch holds to judge outputs by; None where it holds nothing.
Targets = Any
TargetKind = Literal["classes", "pixels"]

TARGET_NAMES = ("labels", "label", "targets", "target", "mask")


def targets_of(batch: Batch) -> Outputs:
    """Targets of a batch: the second item, or the entry called labels, targets or alike; None where there are none."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in TARGET_NAMES if name in batch), None)
    if isinstance(batch, Tensor):
        return None
    items = batch if isinstance(batch, Sequence) else tuple(batch)
    return items[1] if len(items) > 1 else None


def kind_of_targets(targets: Targets) -> TargetKind | None:
    """What class targets are: of samples, (N,) whole numbers or (N, L) shares, or of positions; None: no classes."""
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        return None
    whole = not targets.is_floating_point() and not targets.is_complex()
    if targets.dim() == 1:
        return "classes" if whole else None
    if targets.dim() == 2:
        shares = whole or bool(((targets >= 0) & (targets <= 1)).all())
        return "classes" if shares else None
    return "pixels" if class_map(targets) is not None else None


def class_map(targets: Tensor) -> Tensor | None:
    """Class indices of positions, (N, H, W) or of other dimensions; None where targets are not such a map.

    Args:
        targets: (N, …) or (N, 1, …) whole numbers of any type, or (N, L, …) one-hot or soft.
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


def kind_of_shape(targets: Targets) -> TargetKind | None:
    """As `kind_of_targets`, without a look at the values of (N, L)."""
    if isinstance(targets, Tensor) and targets.dim() == 2:
        return "classes"
    return kind_of_targets(targets)
