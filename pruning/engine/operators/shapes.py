"""Operators that reshape, permute, expand and repeat: the label arrays go through the same movement."""

from __future__ import annotations

import numpy as np

from pruning.engine.labeller import Labeller, aligned, along, operation_name
from pruning.engine.labels import Slot, Value, matching_dims, reshape_slot, support
from pruning.engine.operators.register import arguments, note_size, operator, unknown, wrap
from pruning.engine.traces import Operation

#: See `matching_dims`.
Runs = list[tuple[list[int], list[int]]]


@operator(
    "view _unsafe_view reshape _reshape_alias _reshape_copy view_copy unflatten flatten squeeze unsqueeze "
    "squeeze_ unsqueeze_ view_as reshape_as"
)
def reshaped(run: Labeller, operation: Operation) -> Value:
    """The same elements in the same order under another shape."""
    x = run.at(operation.args[0])
    shape = run.out_shape(operation)
    if x.shape == shape:
        return x
    runs = matching_dims(x.shape, shape)
    labels = _one_a_run(run, operation, _with_labels_of_repeats(run, x, runs), runs)
    slots = [reshape_slot(slot, x.shape, shape) for slot in labels]
    free = set()
    for old_dims, new_dims in runs:
        if all(not x.is_solid(dim) for dim in old_dims):
            free |= {dim for dim in new_dims if shape[dim] > 1}
    value = run.make(operation, shape, slots, frozenset(free))
    if "squeeze" not in operation_name(operation.func):
        _note_dims(run, operation, value)
    return value


def _with_labels_of_repeats(run: Labeller, x: Value, runs: Runs) -> list[Slot]:
    """Labels of a tensor, where repetitions run together with something else too: as often as its partner wishes.

    So are the keys that all heads share, when heads and images become one dimension.
    """
    slots = list(x.slots)
    for old_dims, _ in runs:
        repeats = [dim for dim in old_dims if x.shape[dim] > 1 and dim in x.free]
        solid = any(x.is_solid(dim) for dim in old_dims)
        labelled = any(slot.shape[dim] > 1 for slot in slots for dim in old_dims)
        if len(repeats) == 1 and solid and not labelled:
            slots.append(along(run.table.new(x.shape[repeats[0]]), repeats[0], len(x.shape)))
    return slots


def _one_a_run(run: Labeller, operation: Operation, slots: list[Slot], runs: Runs) -> list[Slot]:
    """Labels that may still go when dimensions are run together: of several sorts one, by default the longest.

    What lies as rows and columns in one dimension could lose both, but no label is of two sorts.
    """
    for old_dims, _ in runs:
        meeting = [slot for slot in slots if any(slot.shape[dim] > 1 for dim in old_dims)]
        if len(meeting) < 2:
            continue
        meeting.sort(key=lambda slot: slot.size)
        atoms = np.concatenate([slot.reshape(-1) for slot in meeting])
        kept = meeting[-1 if run.choice(operation, atoms, "longest") == "longest" else 0]
        for slot in meeting:
            if slot is not kept:
                run.table.freeze(slot, f"{run.describe(operation)} runs it together with other channels")
                slots = [other for other in slots if other is not slot]
    return slots


def _note_dims(run: Labeller, operation: Operation, value: Value) -> None:
    for dim in range(len(value.shape)):
        slot = value.slot_at(dim)
        if slot is not None:
            note_size(run, operation, slot, dim)


@operator("as_strided as_strided_ as_strided_copy")
def restrided(run: Labeller, operation: Operation) -> Value | list[Value]:
    """The same shape in another memory layout; anything else has no rule."""
    x = run.at(operation.args[0])
    return x if x.shape == run.out_shape(operation) else unknown(run, operation)


@operator("permute transpose t transpose_ t_ permute_copy transpose_copy")
def permuted(run: Labeller, operation: Operation) -> Value:
    """Dimensions in another order."""
    x = run.at(operation.args[0])
    rank = len(x.shape)
    name = operation_name(operation.func)
    if name.startswith("permute"):
        order = [wrap(dim, rank) for dim in operation.args[1]]
    else:
        order = list(range(rank))
        first, second = operation.args[1:3] if len(operation.args) > 2 else (rank - 2, rank - 1)
        if rank > 1:
            first, second = wrap(first, rank), wrap(second, rank)
            order[first], order[second] = order[second], order[first]
    shape = tuple(x.shape[dim] for dim in order)
    free = frozenset(new for new, old in enumerate(order) if old in x.free)
    return Value(shape, tuple(slot.transpose(order) for slot in x.slots), free)


@operator("expand expand_copy expand_as broadcast_to")
def expanded(run: Labeller, operation: Operation) -> Value:
    """Repetition along dimensions of extent 1; such a dimension stays free."""
    shape = run.out_shape(operation)
    x = aligned(run.at(operation.args[0]), len(shape))
    repeated = {dim for dim, size in enumerate(shape) if size > 1 and x.shape[dim] == 1}
    value = Value(shape, x.slots, x.free | repeated)
    _note_dims(run, operation, value)
    return value


@operator("repeat tile")
def repeated(run: Labeller, operation: Operation) -> Value:
    """Copies side by side."""
    shape = run.out_shape(operation)
    times = operation.args[1]
    x = aligned(run.at(operation.args[0]), len(shape))
    times = [1] * (len(shape) - len(times)) + list(times)
    slots = []
    for slot in x.slots:
        copied = [dim for dim, n in enumerate(times) if n > 1 and slot.shape[dim] > 1]
        if len(copied) == 1 and support(slot) == tuple(copied):
            slots.append(copies(run, operation, slot, copied[0], times[copied[0]]))
        else:
            slots.append(np.tile(slot, [n if slot.shape[d] > 1 else 1 for d, n in enumerate(times)]))
    free = x.free | {dim for dim, n in enumerate(times) if n > 1 and x.shape[dim] == 1}
    return run.make(operation, shape, slots, frozenset(free))


def copies(run: Labeller, operation: Operation, slot: Slot, dim: int, times: int) -> Slot:
    """Labels of copies side by side: a position goes from all of them, or whole copies go (one filter a channel)."""
    if run.choice(operation, slot, "tiles") == "tiles":
        return np.tile(slot, [times if d == dim else 1 for d in range(slot.ndim)])
    run.table.freeze(slot, f"{run.describe(operation)} copies it as a whole")
    whole = along(run.table.new(times), dim, slot.ndim)
    note_size(run, operation, whole, dim)
    return whole.repeat(slot.shape[dim], axis=dim)


@operator("repeat_interleave")
def interleaved(run: Labeller, operation: Operation) -> Value | list[Value]:
    """Each element several times in a row."""
    named = arguments(operation)
    times, dim = named.get("repeats"), named.get("dim")
    x = run.at(operation.args[0])
    if not isinstance(times, int) or dim is None:
        return unknown(run, operation)
    dim = wrap(dim, len(x.shape))
    slots = [slot.repeat(times, axis=dim) if slot.shape[dim] > 1 else slot for slot in x.slots]
    return run.make(operation, run.out_shape(operation), slots, x.free)


@operator("view_as_real view_as_complex")
def complex_parts(run: Labeller, operation: Operation) -> Value:
    """Real and imaginary part as a last dimension of two, and back."""
    x = run.at(operation.args[0])
    shape = run.out_shape(operation)
    if len(shape) > len(x.shape):
        return Value(shape, tuple(slot[..., None] for slot in x.slots), x.free)
    parts = [run.table.unite_along(slot, (len(x.shape) - 1,)) for slot in x.slots]
    return run.make(operation, shape, [slot[..., 0] for slot in parts], x.free - {len(x.shape) - 1})
