"""Convolutions, linear layers and other contractions: they consume the contracted labels and pass the others on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pruning.engine.labeller import Labeller, aligned, along, operation_name, origins
from pruning.engine.labels import Slot, Value, support
from pruning.engine.operators import unknowns
from pruning.engine.operators.register import (
    arguments,
    as_channel,
    elsewhere,
    note_size,
    operator,
    unknown,
    within,
)
from pruning.engine.operators.windows import kept_windows, slide
from pruning.engine.traces import Operation, Ref


@operator("mm addmm bmm baddbmm", constants=unknowns.matrix_product)
@operator("matmul mv addmv _sparse_mm _sparse_addmm sspaddmm")
def product(run: Labeller, operation: Operation) -> Value | list[Value]:
    """Matrix products, single or in batches, with or without a term added."""
    name = operation_name(operation.func)
    added = name in ("addmm", "baddbmm", "addmv", "_sparse_addmm", "sspaddmm")
    left, right = (run.at(ref) for ref in operation.args[added : added + 2])
    shape = run.out_shape(operation)
    if name in ("mv", "addmv", "matmul") and len(left.shape) != len(right.shape):
        right = Value((*right.shape, 1), tuple(s[..., None] for s in right.slots), right.free)
    if len(left.shape) not in (2, 3) or len(left.shape) != len(right.shape):
        return unknown(run, operation)
    weights = [_origin(run, ref) for ref in operation.args[added : added + 2]]
    value = contract(run, operation, left, right, weights)
    if value.shape != shape:
        value = Value(shape, tuple(slot.reshape(slot.shape[: len(shape)]) for slot in value.slots))
    return run.combine(operation, [run.at(operation.args[0]), value], shape) if added else value


@operator("dot vdot")
def dotted(run: Labeller, operation: Operation) -> Value:
    """The sum of products of two vectors: their labels meet and end here."""
    left, right = run.at(operation.args[0]), run.at(operation.args[1])
    value = run.combine(operation, [left, right], left.shape)
    for slot in value.slots:
        run.note_consumed(operation, slot)
    return Value(())


def _origin(run: Labeller, ref: object) -> str | None:
    """Return the parameter that a factor is, or was computed from (transposed, standardised, normalised)."""
    return next(origins(run.trace, ref.value), None) if isinstance(ref, Ref) else None


def contract(
    run: Labeller, operation: Operation, left: Value, right: Value, weights: list[str | None]
) -> Value:
    """(b, n, k) × (b, k, m), the batch dimension optional.

    Where a label depends on more than the contracted dimension (k of head h), the positions of k that share
    the rest go together, and the result carries their label: attention heads.
    """
    batched = len(left.shape) == 3
    a, b = aligned(left, 3), aligned(right, 3)
    batch, n, k = a.shape
    m = b.shape[2]

    # Both factors as (batch, n, k, m), with extent 1 along the dimension that they lack.
    a4 = Value((batch, n, k, 1), tuple(s[..., None] for s in a.slots), a.free)
    b4 = Value(
        (b.shape[0], 1, k, m), tuple(s[:, None] for s in b.slots), frozenset(d + (d > 0) for d in b.free)
    )
    slot_a, slot_b = a4.slot_at(2), b4.slot_at(2)

    # Labels along k end here. The others, and those of heads, meet in the product (batch, n, 1, m).
    consumed = _consume(run, operation, a4, b4)
    rest = []
    for factor, heads in zip((a4, b4), consumed, strict=True):
        others = tuple(slot for slot in factor.slots if slot.shape[2] == 1)
        shape = (*factor.shape[:2], 1, factor.shape[3])
        rest.append(Value(shape, others + heads, factor.free - {2}))
    value = run.combine(operation, rest, (batch, n, 1, m))

    # Without k, and without the batch dimension where the factors have none.
    slots = tuple(s.reshape(s.shape[0], s.shape[1], s.shape[3]) for s in value.slots)
    _note_product(run, operation, (batch, n, k, m), Value((batch, n, m), slots), (slot_a, slot_b), weights)
    free = frozenset(d - (d > 2) for d in value.free)
    if batched:
        return run.make(operation, (batch, n, m), list(slots), free)
    return run.make(operation, (n, m), [s[0] for s in slots], frozenset(d - 1 for d in free if d))


def _consume(
    run: Labeller, operation: Operation, a: Value, b: Value
) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Unite the labels of both factors along the contracted dimension 2; return the remaining slots of each."""
    slot_a, slot_b = a.slot_at(2), b.slot_at(2)
    where = run.describe(operation)
    if slot_a is None or slot_b is None:
        found = []
        for slot, other in ((slot_a, b), (slot_b, a)):
            solid = (slot,) if slot is not None and other.is_solid(2) else ()
            alone = Value(a.shape, solid)
            found.append(within(run, alone, (2,), f"{where} sums over it with factors of a fixed number"))
        return found[0], found[1]
    joint = len(support(slot_a)) > 1 or len(support(slot_b)) > 1
    if joint and run.choice(operation, slot_a, "heads") == "heads":
        return _consume_heads(run, slot_a, slot_b, where)
    kept = [run.table.unite_along(s, tuple(d for d in support(s) if d != 2)) for s in (slot_a, slot_b)]
    run.table.unite(kept[0], kept[1], f"{where} sums over it together with channels that cannot be removed")
    run.note_consumed(operation, kept[0])
    return (), ()


def _consume_heads(
    run: Labeller, slot_a: Slot, slot_b: Slot, where: str
) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    left, right = run.table.unite_along(slot_a, (2,)), run.table.unite_along(slot_b, (2,))
    if left.size == 1 and right.size == 1:
        run.table.unite(left, right, where)
        return (), ()
    for shared in (left, right):
        if shared.size == 1:
            run.table.freeze(shared, f"{where} with the same factor for all heads")
    return (left,) if left.size > 1 else (), (right,) if right.size > 1 else ()


def _note_product(
    run: Labeller,
    operation: Operation,
    sizes: tuple[int, int, int, int],
    result: Value,
    consumed: tuple[Slot | None, Slot | None],
    weights: list[str | None],
) -> None:
    # The cost is batch · n · m · k; what carries labels along a single dimension is taken out of it as an axis.
    batch, n, k, m = sizes
    axes: list[np.ndarray] = []
    constant = batch * n * m * k
    for slot in result.slots:
        if len(support(slot)) == 1:
            axes.append(slot.reshape(-1))
            constant //= slot.size
    contracted = [slot.reshape(-1) for slot in consumed if slot is not None and support(slot) == (2,)]
    ended = contracted[0] if contracted else None
    if ended is not None:
        axes.append(ended)
        constant //= k
    # Only a product with a parameter produces channels; one of two activations passes them on.
    weight = weights[1] or weights[0]
    columns = [slot.reshape(-1) for slot in result.slots if support(slot) == (2,)]
    produced = columns[0] if columns and weight else None
    run.note_layer(operation, constant, tuple(axes), produced, ended, weight, batch * n)


@operator("linear")
def linear(run: Labeller, operation: Operation) -> Value:
    """x Wᵀ + b on the last dimension."""
    x, weight = run.at(operation.args[0]), run.at(operation.args[1])
    rank = len(x.shape)
    incoming = run.collapse(x, rank - 1)
    columns = run.collapse(weight, 1)
    run.table.unite(incoming, columns, f"{run.describe(operation)} reads channels that cannot be removed")
    run.note_consumed(operation, incoming)
    rows = run.collapse(weight, 0)
    slots = [slot for slot in x.slots if slot.shape[-1] == 1]
    value = run.make(operation, run.out_shape(operation), [*slots, along(rows, rank - 1, rank)])
    positions = math.prod(x.shape[:-1])
    made_of = _origin(run, operation.args[1])
    run.note_layer(operation, positions, (rows, columns), rows, incoming, made_of, positions)
    bias = arguments(operation).get("bias")
    return value if bias is None else run.combine(operation, [value, run.at(bias)], value.shape)


def _window(named: Mapping[str, Any], dim: int) -> tuple[int, int, int] | None:
    """Return the window of a single-channel convolution along a dimension of its input."""
    weight = tuple(named["weight"].shape)
    if dim < 2 or named.get("transposed") or weight[:2] != (1, 1):
        return None
    extent = (weight[dim] - 1) * named["dilation"][dim - 2] + 1
    return extent, named["stride"][dim - 2], named["padding"][dim - 2]


@operator("convolution", constants=unknowns.convolution, statistics=kept_windows(_window))
@operator("_convolution cudnn_convolution mkldnn_convolution convolution_overrideable")
def convolution(run: Labeller, operation: Operation) -> Value:
    """Convolutions of any rank, grouped, depthwise or transposed."""
    named = arguments(operation)
    x, weight = run.at(named["input"]), run.at(named["weight"])
    groups = named["groups"]
    transposed = named.get("transposed", False)
    where = run.describe(operation)
    weight = _rows_or_columns(run, operation, weight)
    x, along_map = _taken_apart(run, operation, x, weight)
    of_any_width = 1 in x.free and x.slot_at(1) is None
    incoming = _of_any_width(run, named["input"]) if of_any_width else run.collapse(x, 1)
    repeats = groups > 1 and 0 in weight.free and weight.slot_at(0) is None  # one kernel for every channel
    first = _of_any_width(run, named["weight"], 0) if repeats else run.collapse(weight, 0)
    second = run.collapse(weight, 1)
    run.note_consumed(operation, incoming)
    if groups == 1:
        taken, given = (first, second) if transposed else (second, first)
        run.table.unite(incoming, taken, f"{where} reads channels that cannot be removed")
        axes: tuple[np.ndarray, ...] = (given, taken)
    elif transposed:
        given, axes = _grouped_transposed(run, operation, incoming, first, second, groups)
    else:
        given, axes = _grouped(run, operation, incoming, first, second, groups)
    shape = run.out_shape(operation)
    slots = [along(given, 1, len(shape)), *(s for s in x.slots if s.shape[1] == 1), *along_map]
    value = run.make(operation, shape, slots)
    positions = shape if not transposed else x.shape
    spatial = math.prod(positions[2:]) * positions[0]
    macs = spatial * math.prod(weight.shape[2:]) * weight.shape[0] * weight.shape[1]
    constant = macs // math.prod(axis.size for axis in axes)
    run.note_layer(operation, constant, axes, given, incoming, _origin(run, named["weight"]), spatial)
    if named["bias"] is None:
        return value
    return run.combine(operation, [value, as_channel(run.at(named["bias"]), len(shape))], shape)


def _rows_or_columns(run: Labeller, operation: Operation, weight: Value) -> Value:
    """Return the labels of a weight, none along its kernel. A weight made from a flat tensor loses rows or columns."""
    kernel = range(2, len(weight.shape))
    reason = f"{run.describe(operation)} has it as the size of its kernel"
    slots = []
    for slot in within(run, weight, kernel, reason):
        longer = int(weight.shape[1] > weight.shape[0])
        slots.append(run.table.unite_along(slot, (1 - longer,)) if support(slot) == (0, 1) else slot)
    return Value(weight.shape, tuple(slots), weight.free)


def _taken_apart(run: Labeller, operation: Operation, x: Value, weight: Value) -> tuple[Value, list[Slot]]:
    """Return x without the labels that the kernel slides over, and those labels after the slide."""
    named = {**arguments(operation), "weight": weight}
    slots = list(x.slots)
    slid = []
    for slot in x.slots:
        moved = slide(run, operation, x, slot, _window(named, support(slot)[0]))
        if moved is not None:
            slots = [other for other in slots if other is not slot]
            slid.append(moved)
    space = tuple(dim for dim in range(2, len(x.shape)) if _mixes(named, dim - 2))
    reason = f"{run.describe(operation)} convolves along it"
    return Value(x.shape, within(run, Value(x.shape, tuple(slots)), space, reason), x.free), slid


def _mixes(named: Mapping[str, Any], place: int) -> bool:
    """Whether a convolution brings positions of one of its dimensions together, or moves them."""
    sizes = [named["weight"].shape[place + 2]]
    for key in ("stride", "padding", "output_padding"):
        given = named.get(key) or [0]
        sizes.append(given[place if len(given) > 1 else 0])
    return sizes[0] != 1 or sizes[1] != 1 or any(sizes[2:])


def _of_any_width(run: Labeller, ref: Ref, dim: int = 1) -> np.ndarray:
    """Labels for the channels of a tensor that repeats along them (a zero state): as many as its reader has.

    The number of them stands where the tensor was made.
    """
    atoms = run.table.new(run.info(ref.value).shape[dim])
    maker = run.trace.maker(ref.value)
    if maker is not None:
        note_size(run, maker, atoms)
    return atoms


def by_blocks(run: Labeller, operation: Operation, incoming: np.ndarray, groups: int) -> bool:
    """Whether whole groups are removed (finer if there are many), or the same position of every group."""
    width = incoming.size // groups
    if width == 1:
        return True
    preferred = "blocks" if groups >= min(width, 16) else "positions"
    return run.choice(operation, incoming, preferred) == "blocks"


def _whole_groups(run: Labeller, operation: Operation, heads: np.ndarray, columns: np.ndarray) -> None:
    """Remove whole groups: their width stays, and their number follows."""
    run.table.freeze(columns, f"the width of the groups of {operation.module!r}, which loses whole groups")
    run.group_counts.append((operation.module, "groups", heads))
    note_size(run, operation, heads)


def _grouped(
    run: Labeller,
    operation: Operation,
    incoming: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    groups: int,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    table = run.table
    where = f"{run.describe(operation)} reads channels that cannot be removed"
    blocks_in, blocks_out = incoming.reshape(groups, -1), rows.reshape(groups, -1)
    if by_blocks(run, operation, incoming, groups):
        heads = table.unite_along(blocks_in, (1,))
        table.unite(heads, blocks_out, where)
        _whole_groups(run, operation, heads.reshape(-1), columns)
        return rows, (rows,)
    table.unite(blocks_in, columns[None], where)
    table.unite_along(blocks_out, (0,))
    return rows, (rows, columns)


def _grouped_transposed(
    run: Labeller,
    operation: Operation,
    incoming: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    groups: int,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    table = run.table
    table.unite(incoming, rows, f"{run.describe(operation)} reads channels that cannot be removed")
    blocks = incoming.reshape(groups, -1)
    if by_blocks(run, operation, incoming, groups):
        heads = table.unite_along(blocks, (1,))
        _whole_groups(run, operation, heads.reshape(-1), columns)
        return np.repeat(heads.reshape(-1), columns.size), (rows,)
    table.unite_along(blocks, (0,))
    return np.tile(columns, groups), (rows, columns)


@elsewhere("torchvision::deform_conv2d")
def deformed(run: Labeller, operation: Operation) -> Value:
    """A convolution whose taps move: points and masks stay, the channels are those of a convolution."""
    named = arguments(operation)
    shape = run.out_shape(operation)
    where = run.describe(operation)
    for key in ("offset", "mask"):
        run.freeze_value(run.at(named[key]), f"{where} takes its points from it")
    x, weight = run.at(named["input"]), run.at(named["weight"])
    run.freeze_value(weight, f"{where} has it as the size of its kernel", (2, 3))
    x = Value(x.shape, within(run, x, (0, 2, 3), f"{where} convolves along it"))
    incoming, rows, columns = run.collapse(x, 1), run.collapse(weight, 0), run.collapse(weight, 1)
    if named["offset_groups"] > 1:
        run.table.unite_along(incoming.reshape(named["offset_groups"], -1), (0,))
    run.note_consumed(operation, incoming)
    axes: tuple[np.ndarray, ...] = (rows, columns)
    if named["groups"] > 1:
        rows, axes = _grouped(run, operation, incoming, rows, columns, named["groups"])
    else:
        run.table.unite(incoming, columns, f"{where} reads channels that cannot be removed")
    spatial = shape[0] * math.prod(shape[2:])
    constant = spatial * math.prod(weight.shape) // math.prod(axis.size for axis in axes)
    run.note_layer(operation, constant, axes, rows, incoming, _origin(run, named["weight"]), spatial)
    value = run.make(operation, shape, [along(rows, 1, 4)])
    return run.combine(operation, [value, as_channel(run.at(named["bias"]), 4)], shape)


@operator("_trilinear")
def trilinear(run: Labeller, operation: Operation) -> Value:
    """The product of three tensors, each with new dimensions, summed over some (a bilinear layer)."""
    named = arguments(operation)
    shape = run.out_shape(operation)
    factors = []
    for number in "123":
        x = run.at(named[f"i{number}"])
        for dim in sorted(named[f"expand{number}"]):
            x = _unsqueezed(x, dim)
        factors.append(x)
    full = tuple(np.broadcast_shapes(*(x.shape for x in factors)))
    value = run.combine(operation, factors, full)
    weight = next((name for ref in ("i1", "i2", "i3") if (name := _origin(run, named[ref]))), None)
    return _summed_over(run, operation, value, tuple(named["sumdim"]), shape, weight)


@operator("_euclidean_dist cdist _cdist_forward")
def distances(run: Labeller, operation: Operation) -> Value:
    """Distances between the rows (…, n, k) and (…, m, k): labels of k meet and end here."""
    left, right = (run.at(ref) for ref in operation.args[:2])
    left, right = _unsqueezed(left, len(left.shape) - 1), _unsqueezed(right, len(right.shape) - 2)
    full = tuple(np.broadcast_shapes(left.shape, right.shape))
    value = run.combine(operation, [left, right], full)
    return _summed_over(run, operation, value, (len(full) - 1,), run.out_shape(operation), None)


def _unsqueezed(x: Value, dim: int) -> Value:
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return Value(
        shape, tuple(np.expand_dims(s, dim) for s in x.slots), frozenset(d + (d >= dim) for d in x.free)
    )


def _summed_over(
    run: Labeller,
    operation: Operation,
    value: Value,
    dims: tuple[int, ...],
    shape: tuple[int, ...],
    weight: str | None,
) -> Value:
    """Labels of a product after it was summed over `dims`; those of a single such dimension end here."""
    slots, axes, consumed = [], [], []
    for slot in value.slots:
        if len(support(slot)) == 1:
            axes.append(slot.reshape(-1))
        if set(support(slot)) <= set(dims):
            run.note_consumed(operation, slot)
            consumed.append(slot.reshape(-1))
        else:
            slots.append(np.squeeze(run.table.unite_along(slot, dims), dims))
    constant = math.prod(value.shape) // math.prod(axis.size for axis in axes)
    produced = [slot.reshape(-1) for slot in slots if support(slot) == (len(shape) - 1,)]
    run.note_layer(
        operation,
        constant,
        tuple(axes),
        produced[0] if produced and weight else None,
        consumed[0] if consumed else None,
        weight,
        math.prod(shape[:-1]),
    )
    return run.make(operation, shape, slots)


@operator("_weight_norm_interface _weight_norm")
def weight_normalised(run: Labeller, operation: Operation) -> list[Value]:
    """g · v / ‖v‖: the norm follows its rows; surgery rescales g so that the kept weights stay as they are."""
    v, g = run.at(operation.args[0]), run.at(operation.args[1])
    value = run.combine(operation, [v, g], v.shape)
    return [value, Value(g.shape)]
