"""Operators that take tensors apart and put them together: slices, splits, joins, pads, shuffles."""

from __future__ import annotations

import math

import numpy as np

from pruning.engine.labeller import Labeller, along
from pruning.engine.labels import Slot, Value, compress, support
from pruning.engine.operators import unknowns
from pruning.engine.operators.register import (
    all_dims,
    arguments,
    dim_list,
    note_size,
    operator,
    wrap,
)
from pruning.engine.operators.shapes import copies
from pruning.engine.traces import Operation


@operator("select select_copy")
def selected(run: Labeller, operation: Operation) -> Value:
    """One position of a dimension."""
    x = run.at(operation.args[0])
    dim = wrap(operation.args[1], len(x.shape))
    return _select(run, operation, x, dim, operation.args[2])


def _select(run: Labeller, operation: Operation, x: Value, dim: int, index: int) -> Value:
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    slots = []
    for slot in x.slots:
        if support(slot) == (dim,):
            if run.is_read(operation):
                run.table.freeze(slot, f"{run.describe(operation)} picks a single channel")
            continue
        slots.append(compress(slot.take(index if slot.shape[dim] > 1 else 0, axis=dim)))
    free = frozenset(d - (d > dim) for d in x.free if d != dim)
    return run.make(operation, shape, slots, free)


@operator("unbind unbind_copy")
def unbound(run: Labeller, operation: Operation) -> list[Value]:
    """Every position of a dimension on its own."""
    x = run.at(operation.args[0])
    dim = wrap(arguments(operation)["dim"], len(x.shape))
    return [_select(run, operation, x, dim, index) for index in range(x.shape[dim])]


@operator("slice slice_copy narrow")
def sliced(run: Labeller, operation: Operation) -> Value:
    """A range of a dimension. Ranges that divide it evenly are taken as chunks of equal width."""
    named = arguments(operation)
    x = run.at(operation.args[0])
    dim = wrap(named["dim"], len(x.shape))
    size = x.shape[dim]
    if "length" in named:
        start = named["start"]
        step = 1
        end = named["start"] + named["length"]
    else:
        start, end, step = slice(named["start"], named["end"], named["step"]).indices(size)
    shape = (*x.shape[:dim], len(range(start, end, step)), *x.shape[dim + 1 :])
    slot = x.slot_at(dim)
    if shape == x.shape or slot is None:
        return Value(shape, x.slots, x.free & all_dims(shape))
    if not run.is_read(operation):  # only its shape matters, and that is what it is
        return Value(shape, tuple(s for s in x.slots if s is not slot), x.free & all_dims(shape))
    slot = _couple_slices(run, operation, slot, dim, range(start, end, step), size)
    part = compress(slot.take(np.arange(start, end, step), axis=dim))
    others = [other for other in x.slots if other.shape[dim] == 1]
    return run.make(operation, shape, [*others, part], x.free)


def _couple_slices(
    run: Labeller, operation: Operation, slot: Slot, dim: int, taken: range, size: int
) -> Slot:
    """Tie channels so that a slice still cuts in the same places when some are gone."""
    length = len(taken)
    step = abs(taken.step)
    atoms = np.moveaxis(slot, dim, -1)
    if step > 1:
        if size % step == 0:
            run.table.unite_along(atoms.reshape(*atoms.shape[:-1], size // step, step), (atoms.ndim,))
        else:
            run.table.freeze(slot, f"{run.describe(operation)} takes every {step}th channel")
        return slot
    # A single channel (an alpha beside colours) is not one chunk of many.
    even = length > 1 and size % length == 0 and taken.start % length == 0
    if even and run.choice(operation, slot, "even") == "even":
        blocks = atoms.reshape(*atoms.shape[:-1], size // length, length)
        run.table.unite_along(blocks, (blocks.ndim - 2,))
    note_size(run, operation, slot.take(range(taken.start), axis=dim), dim)
    note_size(run, operation, slot.take(range(taken.start + length), axis=dim), dim)
    note_size(run, operation, slot.take(taken, axis=dim), dim)
    return slot


@operator(
    "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk split_copy unsafe_split_with_sizes"
)
def split(run: Labeller, operation: Operation) -> list[Value]:
    """Consecutive parts of a dimension. Equal parts stay equal; others may change width one by one."""
    x = run.at(operation.args[0])
    dim = wrap(arguments(operation)["dim"], len(x.shape))
    sizes = [run.info(out).shape[dim] for out in operation.outputs if out is not None]
    slot = x.slot_at(dim)
    even = len(set(sizes)) == 1 and len(sizes) > 1
    if slot is not None and even and run.choice(operation, slot, "even") == "even":
        atoms = np.moveaxis(slot, dim, -1)
        blocks = atoms.reshape(*atoms.shape[:-1], len(sizes), sizes[0])
        run.table.unite_along(blocks, (blocks.ndim - 2,))
    if slot is not None:
        note_size(run, operation, slot, dim)
    others = [other for other in x.slots if other.shape[dim] == 1]
    values = []
    uses = []
    start = 0
    for size in sizes:
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        slots = list(others)
        if slot is not None:
            part = slot.take(range(start, start + size), axis=dim)
            uses.append(note_size(run, operation, part, dim))
            slots.append(compress(part))
        values.append(run.make(operation, shape, slots, x.free & all_dims(shape)))
        start += size
    run.splits += [uses] if uses else []
    return values


@operator("glu")
def gated(run: Labeller, operation: Operation) -> Value:
    """The first half times the sigmoid of the second."""
    x = run.at(operation.args[0])
    dim = wrap(arguments(operation)["dim"], len(x.shape))
    shape = run.out_shape(operation)
    slot = x.slot_at(dim)
    slots = [other for other in x.slots if other.shape[dim] == 1]
    if slot is not None:
        first, second = np.split(slot, 2, axis=dim)
        run.table.unite(
            first, second, f"{run.describe(operation)} multiplies channels that cannot be removed"
        )
        slots.append(compress(first))
    return run.make(operation, shape, slots, x.free & all_dims(shape))


@operator("cat concat concatenate")
def joined(run: Labeller, operation: Operation) -> Value:
    """Tensors side by side along a dimension."""
    shape = run.out_shape(operation)
    dim = wrap(arguments(operation)["dim"], len(shape))
    refs = operation.args[0]
    x = run.at(refs[0])
    if len(refs) > 1 and all(ref == refs[0] for ref in refs):
        slots = [
            copies(run, operation, slot, dim, len(refs)) if support(slot) == (dim,) else slot
            for slot in x.slots
        ]
        if all(slot.shape[dim] in (1, shape[dim]) for slot in slots):
            return run.make(operation, shape, slots, x.free)
    parts = [run.at(ref) for ref in refs if run.at(ref).shape != (0,)]
    return _join(run, operation, parts, dim, shape)


@operator("stack")
def stacked(run: Labeller, operation: Operation) -> Value:
    """Tensors side by side along a new dimension."""
    shape = run.out_shape(operation)
    dim = wrap(arguments(operation)["dim"], len(shape))
    parts = []
    for ref in operation.args[0]:
        x = run.at(ref)
        one = (*x.shape[:dim], 1, *x.shape[dim:])
        free = frozenset(d + (d >= dim) for d in x.free)
        parts.append(Value(one, tuple(np.expand_dims(slot, dim) for slot in x.slots), free))
    return _join(run, operation, parts, dim, shape)


def _join(run: Labeller, operation: Operation, parts: list[Value], dim: int, shape: tuple[int, ...]) -> Value:
    """Labels along `dim` are strung together; those along other dimensions are the same for all parts."""
    # pieces: the labels of every part along `dim`, -1 where it has none. across: its labels along all else.
    pieces: list[np.ndarray] = []
    across: list[Value] = []
    strung = any(part.slot_at(dim) is not None for part in parts)
    for part in parts:
        slot = part.slot_at(dim)
        if slot is None and strung and dim in part.free:  # padding: as wide as its neighbour wishes
            slot = along(run.table.new(part.shape[dim]), dim, len(shape))
            note_size(run, operation, slot, dim)
        if slot is None:
            slot = np.full([1] * len(shape), -1)
            pieces.append(np.broadcast_to(slot, along(np.empty(part.shape[dim]), dim, len(shape)).shape))
        else:
            pieces.append(slot)
        rest = tuple(1 if d == dim else size for d, size in enumerate(part.shape))
        others = tuple(other for other in part.slots if other.shape[dim] == 1)
        joint = [other for other in part.slots if other.shape[dim] > 1]
        solid_through = {d for other in joint for d in support(other)}
        across.append(Value(rest, others, part.free | frozenset(solid_through)))
    # Along other dimensions all parts lie side by side, so their labels there meet.
    outer = tuple(1 if d == dim else size for d, size in enumerate(shape))
    value = run.combine(operation, across, outer)
    slots = list(value.slots)
    if strung or any(slot.shape[dim] > 1 for part in parts for slot in part.slots):
        # A part may vary along more than `dim` (heads): all are written out as far as any of them does.
        extents = [max(piece.shape[d] for piece in pieces) for d in range(len(shape))]
        full = []
        for piece in pieces:
            extents[dim] = piece.shape[dim]
            full.append(np.broadcast_to(piece, extents))
        slots.append(compress(np.concatenate(full, axis=dim)))
    free = {d for d in range(len(shape)) if d != dim and all(d in part.free for part in parts)}
    return run.make(operation, shape, slots, frozenset(free))


@operator("constant_pad_nd", constants=unknowns.pad)
@operator("pad")
def padded(run: Labeller, operation: Operation) -> Value:
    """A border of one value. Along channels its width may have to follow: it gets atoms of its own."""
    x = run.at(operation.args[0])
    pads = list(operation.args[1])
    shape = run.out_shape(operation)
    rank = len(shape)
    slots = list(x.slots)
    for position in range(len(pads) // 2):
        dim, before, after = rank - 1 - position, pads[2 * position], pads[2 * position + 1]
        index = next((i for i, slot in enumerate(slots) if slot.shape[dim] > 1), None)
        if index is not None and (before or after):
            slots[index] = _pad_slot(run, operation, slots[index], dim, before, after)
    return run.make(operation, shape, slots, x.free & all_dims(shape))


def _pad_slot(run: Labeller, operation: Operation, slot: Slot, dim: int, before: int, after: int) -> Slot:
    if before < 0 or after < 0:
        run.table.freeze(slot, f"{run.describe(operation)} cuts channels off")
        return slot.take(range(max(0, -before), slot.shape[dim] - max(0, -after)), axis=dim)
    sides = []
    for count in (before, after):
        border = along(run.table.new(count), dim, slot.ndim)
        if count:
            note_size(run, operation, border, dim)
        sides.append(np.broadcast_to(border, [count if d == dim else e for d, e in enumerate(slot.shape)]))
    return np.concatenate([sides[0], slot, sides[1]], axis=dim)


@operator("flip")
def flipped(run: Labeller, operation: Operation) -> Value:
    """Reversed order along some dimensions."""
    x = run.at(operation.args[0])
    dims = dim_list(operation.args[1], len(x.shape))
    return Value(x.shape, tuple(np.flip(slot, dims) for slot in x.slots), x.free)


@operator("roll")
def rolled(run: Labeller, operation: Operation) -> Value:
    """A cyclic shift: free in space; along channels its distance is a fixed number."""
    x = run.at(operation.args[0])
    dims = dim_list(arguments(operation)["dims"], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} shifts channels by a fixed number", dims)
    return x if dims else Value(x.shape)


@operator("pixel_shuffle")
def pixel_shuffled(run: Labeller, operation: Operation) -> Value:
    """Blocks of r² channels become r×r pixels: the channels of a block go together."""
    x = run.at(operation.args[0])
    factor = operation.args[1]
    rank = len(x.shape)
    blocks = run.collapse(x, rank - 3).reshape(-1, factor * factor)
    return run.make(
        operation, run.out_shape(operation), [along(run.table.unite_along(blocks, (1,)), rank - 3, rank)]
    )


@operator("pixel_unshuffle")
def pixel_unshuffled(run: Labeller, operation: Operation) -> Value:
    """Each channel becomes r² channels."""
    x = run.at(operation.args[0])
    factor = operation.args[1]
    rank = len(x.shape)
    atoms = np.repeat(run.collapse(x, rank - 3), factor * factor)
    return run.make(operation, run.out_shape(operation), [along(atoms, rank - 3, rank)])


@operator("channel_shuffle native_channel_shuffle")
def channel_shuffled(run: Labeller, operation: Operation) -> Value:
    """(groups, width) channels in the order (width, groups): equal positions of all groups go together."""
    x = run.at(operation.args[0])
    groups = operation.args[1]
    table = run.collapse(x, 1).reshape(groups, -1)
    run.table.unite_along(table, (0,))
    return run.make(operation, x.shape, [along(table.T.reshape(-1), 1, len(x.shape))])


@operator("im2col")
def patches(run: Labeller, operation: Operation) -> Value:
    """Every kernel position of every channel becomes a channel."""
    x = run.at(operation.args[0])
    kernel = operation.args[1]
    atoms = np.repeat(run.collapse(x, 1), math.prod(kernel))
    return run.make(operation, run.out_shape(operation), [along(atoms, 1, 3)])


@operator("col2im")
def laid_back(run: Labeller, operation: Operation) -> Value:
    """Patches laid over each other: all kernel positions of a channel become that channel again."""
    x = run.at(operation.args[0])
    kernel = operation.args[2]
    shape = run.out_shape(operation)
    dim = len(x.shape) - 2
    blocks = run.collapse(x, dim).reshape(-1, math.prod(kernel))
    atoms = run.table.unite_along(blocks, (1,))
    return run.make(operation, shape, [along(atoms.reshape(-1), dim, len(shape))])


@operator("unfold")
def windows(run: Labeller, operation: Operation) -> Value:
    """Sliding windows over one dimension, as a new last dimension."""
    x = run.at(operation.args[0])
    dim = wrap(operation.args[1], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} slides over channels", (dim,))
    slots = [slot[..., None] for slot in x.slots if slot.shape[dim] == 1]
    return run.make(operation, run.out_shape(operation), slots)
