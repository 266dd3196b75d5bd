"""Calibration batches: the network's inputs in them, their number of samples, and moving and splitting them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from image_classification.config import SettingError
from image_classification.models.running import Outputs

#: An item of calibration: (inputs, targets), a mapping, a tensor, or anything that `forward` accepts.
Batch = Any


def check_batches(calibration: object) -> None:
    """Refuse a single batch, or anything else that is not an iterable of batches.

    Raises:
        SettingError: The message names what was passed and what to pass instead.
    """
    if isinstance(calibration, (Tensor, Mapping, nn.Module, str)) or not isinstance(calibration, Iterable):
        problem = "give an iterable of batches, such as a DataLoader or [(images, targets)]"
        raise SettingError("calibration", type(calibration).__name__, problem)
    if isinstance(calibration, (tuple, list)) and len(calibration) == 2:
        first, second = calibration
        if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() != second.dim():
            raise SettingError(
                "calibration", "(images, targets)", "this is one batch: give an iterable, [(images, targets)]"
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors to a device; other objects are moved by their own `to`."""

    def move(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf if leaf.device == device else leaf.to(device, non_blocking=True)
        if isinstance(leaf, Mapping):
            return {key: to_device(value, device) for key, value in leaf.items()}
        own = getattr(leaf, "to", None)
        if callable(own):
            return own(device)
        return leaf

    if isinstance(batch, (Tensor, Mapping, tuple, list)) or callable(getattr(batch, "to", None)):
        return tree_map(move, batch)
    if isinstance(batch, Iterable):
        return tree_map(move, tuple(batch))
    return _with_attributes(
        batch, {name: to_device(value, device) for name, value in named_parts(batch).items()}
    )


def named_parts(batch: Batch) -> dict[str, object]:
    """Return the attributes of a batch that is an object of the user's own, such as a dataclass."""
    parts = dict(vars(batch)) if hasattr(batch, "__dict__") else {}
    for kind in type(batch).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if not slot.startswith("__") and hasattr(batch, slot):
                parts[slot] = getattr(batch, slot)
    return parts


def _with_attributes(batch: Batch, attributes: Mapping[str, object]) -> Batch:
    """Return the batch, or a copy of it if an attribute is another object than before."""
    changed = {name: value for name, value in attributes.items() if value is not getattr(batch, name)}
    if not changed:
        return batch
    batch = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(batch, name, value)  # a frozen dataclass refuses assignments
    return batch


def inputs_of(batch: Batch) -> Outputs:
    """Return the network's default input from a batch: all of a tensor or mapping, else the first item."""
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    if isinstance(batch, (tuple, list)):
        return batch[0]
    if isinstance(batch, Iterable):
        return next(iter(batch))
    raise SettingError(
        "calibration",
        type(batch).__name__,
        "this is not a batch: yield (images, targets), a mapping or a tensor, or give forward=",
    )


def inputs_or_parts(batch: Batch) -> Outputs:
    """Return what `inputs_of` does; of an object that only `forward` understands, all its parts by name."""
    return inputs_of(batch) if isinstance(batch, (Tensor, Iterable)) else named_parts(batch)


def num_samples(batch: Batch) -> int:
    """Return a batch's number of samples: the first dimension of its first tensor, or the length of a list of
    samples.
    """
    inputs = inputs_or_parts(batch)
    if isinstance(inputs, Mapping):
        counts = [_count(value) for value in inputs.values()]
        return next((count for count in counts if count is not None), 1)
    if isinstance(inputs, tuple):
        counts = [_count(value) for value in inputs]
        return next((count for count in counts if count is not None), 1)
    return _count(inputs) or (0 if isinstance(inputs, (Tensor, list)) and len(inputs) == 0 else 1)


def _count(value: object) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    return len(value) if isinstance(value, (list, tuple)) else None


def pieces_of(batch: Batch, pieces: int) -> list[Batch]:
    """Split a batch into parts, if it is a tuple or list of tensors of equal length; otherwise return it whole."""
    if pieces == 1 or not isinstance(batch, (tuple, list)):
        return [batch]
    if not all(isinstance(item, Tensor) and item.dim() and len(item) == len(batch[0]) for item in batch):
        return [batch]
    return list(zip(*(item.chunk(pieces) for item in batch), strict=True))
