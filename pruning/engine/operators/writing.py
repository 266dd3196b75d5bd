"""Writes through views: the labels of a tensor after a part of it was overwritten."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pruning.engine.labeller import Labeller, along, operation_name
from pruning.engine.labels import Value, compress, support
from pruning.engine.operators.register import note_size
from pruning.engine.traces import Operation, ViewStep

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
    viewed = _positions(whole, chain)
    if len(part.slots) > 1 or len(whole.slots) > 1:
        return _write_apart(run, operation, whole, part, viewed)
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


def _positions(whole: Value, chain: tuple[ViewStep, ...]) -> Tensor:
    """Return the position in the flattened tensor of each element that a chain of views shows."""
    viewed = torch.arange(math.prod(whole.shape)).reshape(whole.shape)
    for step in chain:
        kwargs = {key: value for key, value in step.kwargs.items() if key != "_position"}
        viewed = step.func(viewed, *step.args, **kwargs)
        viewed = viewed[step.kwargs["_position"]] if "_position" in step.kwargs else viewed
    return viewed


def _dim_along(whole: Value, viewed: Tensor, dim: int) -> int:
    """Return the dimension of a view that follows one of its base tensor; -1 if several or none do."""
    where = np.unravel_index(viewed.numpy(), whole.shape)[dim]
    varying = [d for d in range(where.ndim) if (where != where.take([0], axis=d)).any()]
    return varying[0] if len(varying) == 1 else -1


def _write_apart(run: Labeller, operation: Operation, whole: Value, part: Value, viewed: Tensor) -> Value:
    """Labels along several dimensions: those that the part takes whole meet its own, the others must stay."""
    met: set[int] = set()
    kept = []
    for slot in whole.slots:
        dims = support(slot)
        place = _dim_along(whole, viewed, dims[0]) if len(dims) == 1 else -1
        own = part.slot_at(place) if place >= 0 else None
        if own is None or support(own) != (place,) or own.size != slot.size:
            run.freeze_value(
                Value(whole.shape, (slot,)), f"{run.describe(operation)} writes into a part of it"
            )
            continue
        run.table.unite(slot.reshape(-1), own.reshape(-1), f"{run.describe(operation)} writes it over others")
        met.add(place)
        kept.append(slot)
    for own in part.slots:
        if support(own) not in {(place,) for place in met}:
            reason = f"{run.describe(operation)} writes it into a part of another tensor"
            run.freeze_value(Value(part.shape, (own,)), reason)
    return run.make(operation, whole.shape, kept, whole.free)


def _fresh_labels(
    run: Labeller, operation: Operation, whole: Value, part: Value, viewed: Tensor
) -> np.ndarray:
    """Labels for a tensor that only repeats one number, along the dimension that the part is labelled in."""
    dims = support(part.slots[0])
    along_part = {_dim_along(whole, viewed, d): d for d in range(len(whole.shape)) if d in whole.free}
    dim = along_part.get(dims[0], -1) if len(dims) == 1 else -1
    if dim < 0:
        return np.full(math.prod(whole.shape), -1, dtype=np.int64)
    atoms = along(run.table.new(whole.shape[dim]), dim, len(whole.shape))
    note_size(run, operation, atoms, dim)
    return np.broadcast_to(atoms, whole.shape).reshape(-1).copy()
