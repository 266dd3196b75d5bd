"""Convolutions, linear layers and other contractions: they consume the contracted labels and pass the others on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pruning.labelling import Labeller, aligned, along, operation_name, origins
from pruning.labels import Slot, Value, support
from pruning.operators.register import arguments, as_channel, note_size, rule, unknown
from pruning.tracing import Operation, Ref


@rule("mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "addmv", "dot")
def product(run: Labeller, operation: Operation) -> Value | list[Value]:
    """Matrix products, single or in batches, with or without a term added."""
    name = operation_name(operation.func)
    added = name in ("addmm", "baddbmm", "addmv")
    left, right = (run.at(ref) for ref in operation.args[added : added + 2])
    shape = run.out_shape(operation)
    if name in ("mv", "addmv", "dot", "matmul") and len(left.shape) != len(right.shape):
        right = Value((*right.shape, 1), tuple(s[..., None] for s in right.slots), right.free)
    if name == "dot" or len(left.shape) not in (2, 3) or len(left.shape) != len(right.shape):
        return unknown(run, operation)
    weights = [_origin(run, ref) for ref in operation.args[added : added + 2]]
    value = contract(run, operation, left, right, weights)
    if value.shape != shape:
        value = Value(shape, tuple(slot.reshape(slot.shape[: len(shape)]) for slot in value.slots))
    return run.combine(operation, [run.at(operation.args[0]), value], shape) if added else value


def _origin(run: Labeller, ref: Any) -> str | None:
    """The parameter that a factor is, or was made of (transposed, standardised, normalised)."""
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
    (batch, n, k), m = a.shape, b.shape[2]
    a4 = Value((batch, n, k, 1), tuple(s[..., None] for s in a.slots), a.free)
    b4 = Value(
        (b.shape[0], 1, k, m), tuple(s[:, None] for s in b.slots), frozenset(d + (d > 0) for d in b.free)
    )
    slot_a, slot_b = a4.slot_at(2), b4.slot_at(2)
    consumed = _consume(run, operation, a4, b4)
    rest = [
        Value(
            (*v.shape[:2], 1, v.shape[3]), tuple(s for s in v.slots if s.shape[2] == 1) + extra, v.free - {2}
        )
        for v, extra in ((a4, consumed[0]), (b4, consumed[1]))
    ]
    value = run.combine(operation, rest, (batch, n, 1, m))
    slots = tuple(s.reshape(s.shape[0], s.shape[1], s.shape[3]) for s in value.slots)
    _note_product(run, operation, (batch, n, k, m), Value((batch, n, m), slots), (slot_a, slot_b), weights)
    free = frozenset(d - (d > 2) for d in value.free)
    if batched:
        return run.make(operation, (batch, n, m), list(slots), free)
    return run.make(operation, (n, m), [s[0] for s in slots], frozenset(d - 1 for d in free if d))


def _consume(
    run: Labeller, operation: Operation, a: Value, b: Value
) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Unite the labels of both factors along the contracted dimension 2; what stays of each."""
    slot_a, slot_b = a.slot_at(2), b.slot_at(2)
    where = run.describe(operation)
    if slot_a is None or slot_b is None:
        for slot, other in ((slot_a, b), (slot_b, a)):
            if slot is not None and other.is_solid(2):
                run.table.freeze(slot, f"{where} sums over it with factors of a fixed number")
        return (), ()
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
    if left.size == 1 or right.size == 1:  # one factor is the same for all heads
        run.table.unite(left, right, where)
        return (), ()
    return (left,), (right,)


def _note_product(
    run: Labeller,
    operation: Operation,
    sizes: tuple[int, int, int, int],
    result: Value,
    consumed: tuple[Slot | None, Slot | None],
    weights: list[str | None],
) -> None:
    batch, n, k, m = sizes
    axes: list[np.ndarray] = []
    constant = batch * n * m * k
    for slot in result.slots:
        if len(support(slot)) == 1:
            axes.append(slot.reshape(-1))
            constant //= slot.size
    ended = next((s.reshape(-1) for s in consumed if s is not None and support(s) == (2,)), None)
    if ended is not None:
        axes.append(ended)
        constant //= k
    weight = weights[1] or weights[0]
    produced = next((s.reshape(-1) for s in result.slots if weight and support(s) == (2,)), None)
    run.note_layer(operation, constant, tuple(axes), produced, ended, weight, batch * n)


@rule("linear")
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


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(run: Labeller, operation: Operation) -> Value:
    """Convolutions of any rank, grouped, depthwise or transposed."""
    named = arguments(operation)
    x, weight = run.at(named["input"]), run.at(named["weight"])
    groups, transposed = named["groups"], named.get("transposed", False)
    where = run.describe(operation)
    run.freeze_value(weight, f"{where} has it as the size of its kernel", tuple(range(2, len(weight.shape))))
    run.freeze_value(x, f"{where} convolves along it", tuple(range(2, len(x.shape))))
    incoming = run.collapse(x, 1)
    first, second = run.collapse(weight, 0), run.collapse(weight, 1)
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
    slots = [along(given, 1, len(shape)), *(s for s in x.slots if support(s) == (0,))]
    value = run.make(operation, shape, slots)
    positions = shape if not transposed else x.shape
    spatial = math.prod(positions[2:]) * positions[0]
    macs = spatial * math.prod(weight.shape[2:]) * weight.shape[0] * weight.shape[1]
    constant = macs // math.prod(axis.size for axis in axes)
    run.note_layer(operation, constant, axes, given, incoming, _origin(run, named["weight"]), spatial)
    if named["bias"] is None:
        return value
    return run.combine(operation, [value, as_channel(run.at(named["bias"]), len(shape))], shape)


def by_blocks(run: Labeller, operation: Operation, incoming: np.ndarray, groups: int) -> bool:
    """Whether whole groups go (finer when there are many) or the same position of every group."""
    width = incoming.size // groups
    if width == 1:
        return True
    preferred = "blocks" if groups >= min(width, 16) else "positions"
    return run.choice(operation, incoming, preferred) == "blocks"


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
        table.freeze(columns, f"the width of the groups of {operation.module!r}, which loses whole groups")
        run.group_counts.append((operation.module, "groups", heads.reshape(-1)))
        note_size(run, operation, heads.reshape(-1))
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
    run.table.unite(incoming, rows, f"{run.describe(operation)} reads channels that cannot be removed")
    blocks = incoming.reshape(groups, -1)
    if by_blocks(run, operation, incoming, groups):
        heads = table.unite_along(blocks, (1,))
        table.freeze(columns, f"the width of the groups of {operation.module!r}, which loses whole groups")
        run.group_counts.append((operation.module, "groups", heads.reshape(-1)))
        note_size(run, operation, heads.reshape(-1))
        return np.repeat(heads.reshape(-1), columns.size), (rows,)
    table.unite_along(blocks, (0,))
    return np.tile(columns, groups), (rows, columns)


@rule("_weight_norm_interface", "_weight_norm")
def weight_normalised(run: Labeller, operation: Operation) -> list[Value]:
    """g · v / ‖v‖: the norm follows its rows; surgery rescales g so that the kept weights stay as they are."""
    v, g = run.at(operation.args[0]), run.at(operation.args[1])
    value = run.combine(operation, [v, g], v.shape)
    return [value, Value(g.shape)]
