"""Writing through views: what a tensor's labels are after a part of it was overwritten."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pruning.engine.labeller import Labeller, along, operation_name
from pruning.engine.labels import Value, compress, support
from pruning.engine.operators.register import note_size
from pruning.engine.tracing import Operation, ViewStep

_OTHER_NAMES = frozenset({"detach", "alias", "view_as"})  # the same tensor as another object


def written_through(run: Labeller, operation: Operation) -> Value:
    """A tensor after a part of it was written through a view."""
    assert operation.writes_to is not None
    before, chain, _ = operation.writes_to
    written = operation.outputs[0]
    assert written is not None
    whole = run.at(before)
    part = run.values[-1][written]
    assert part is not None
    return _write(run, operation, whole, part, chain) if part.slots or whole.slots else whole


def _write(
    run: Labeller, operation: Operation, whole: Value, part: Value, chain: tuple[ViewStep, ...]
) -> Value:
    """Follow the chain of views with positions of the whole tensor in place of its numbers."""
    if all(operation_name(step.func) in _OTHER_NAMES for step in chain):  # the whole tensor was written
        return run.combine(operation, [whole, part], whole.shape)
    if len(part.slots) > 1 or len(whole.slots) > 1:
        run.freeze_value(whole, f"{run.describe(operation)} writes into a part of it")
        run.freeze_value(part, f"{run.describe(operation)} writes it into a part of another tensor")
        return Value(whole.shape)
    positions = torch.arange(math.prod(whole.shape)).reshape(whole.shape)
    viewed = positions
    for step in chain:
        kwargs = {key: value for key, value in step.kwargs.items() if key != "_position"}
        viewed = step.func(viewed, *step.args, **kwargs)
        viewed = viewed[step.kwargs["_position"]] if "_position" in step.kwargs else viewed
    if not part.slots and all(dim in part.free for dim, size in enumerate(part.shape) if size > 1):
        return whole  # one number everywhere: what is left of a channel is written as much
    labels = np.broadcast_to(whole.slots[0] if whole.slots else np.array(-1), whole.shape).reshape(-1).copy()
    old = labels[viewed.numpy().reshape(-1)]
    new = np.broadcast_to(part.slots[0] if part.slots else np.array(-1), part.shape).reshape(-1)
    if np.array_equal(old, new):
        return whole
    if not whole.slots and part.slots:  # a fresh tensor: what is not written yet is as wide as it must be
        labels = _fresh_labels(run, operation, whole, part, viewed)
    labels[viewed.numpy().reshape(-1)] = new
    return run.make(operation, whole.shape, [compress(labels.reshape(whole.shape))], whole.free)


def _fresh_labels(
    run: Labeller, operation: Operation, whole: Value, part: Value, viewed: Tensor
) -> np.ndarray:
    """Labels for a tensor that only repeats one number, along the dimension that the part is labelled in."""
    dims = support(part.slots[0])
    dim = dims[0] if len(dims) == 1 else -1
    if len(part.shape) != len(whole.shape) or dim not in whole.free:
        return np.full(math.prod(whole.shape), -1, dtype=np.int64)
    atoms = along(run.table.new(whole.shape[dim]), dim, len(whole.shape))
    note_size(run, operation, atoms, dim)
    return np.broadcast_to(atoms, whole.shape).reshape(-1).copy()
