"""What each ATen operator does to channel labels.

Data movement acts on the label arrays literally; element-wise operators unite what they bring together;
contractions consume the labels of the contracted dimension and pass the others on; statistics over channels
and operators that are not listed freeze what they touch, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pruning.labelling import (
    Labeller,
    Rule,
    SizeUse,
    StatisticsUse,
    aligned,
    along,
    operation_name,
    origins,
)
from pruning.labels import Slot, Value, compress, matching_dims, reshape_slot, support
from pruning.tracing import Operation, Ref

aten = torch.ops.aten
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for every overload of the named ATen operators (those that this PyTorch has)."""

    def register(function: Rule) -> Rule:
        for name in names:
            packet = getattr(aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                RULES[getattr(packet, overload)] = function
        return function

    return register


def arguments(operation: Operation) -> dict[str, Any]:
    """All arguments by their schema name, defaults filled in."""
    schema = operation.func._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema}
    bound.update({argument.name: value for argument, value in zip(schema, operation.args, strict=False)})
    bound.update(operation.kwargs)
    return bound


def wrap(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def dim_list(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front; all of them for None or an empty list."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    return tuple(wrap(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims))


def note_size(run: Labeller, operation: Operation, atoms: np.ndarray, dim: int = 0) -> None:
    """Remember that `atoms.shape[dim]` stands among the operator's arguments as a number."""
    use = SizeUse(operation.module, operation.stack, operation_name(operation.func), atoms, dim)
    run.size_uses.append(use)


# -- element by element ------------------------------------------------------------------------------------


def pointwise(run: Labeller, operation: Operation) -> Value:
    """Operators that PyTorch declares element-wise."""
    values = [run.at(leaf) for leaf in _tensor_arguments(operation)]
    return run.combine(operation, values, run.out_shape(operation))


def unknown(run: Labeller, operation: Operation) -> list[Value]:
    """Operators without a rule: what goes in can no longer be removed."""
    for leaf in _tensor_arguments(operation):
        run.freeze_value(run.at(leaf), f"{run.describe(operation)} is an operator without a rule")
    return [Value(run.info(out).shape if out is not None else ()) for out in operation.outputs]


def _tensor_arguments(operation: Operation) -> list[Ref]:
    leaves = torch.utils._pytree.tree_leaves((operation.args, operation.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]


RULES["pointwise"] = pointwise
RULES["unknown"] = unknown


@rule("hardswish", "hardswish_", "mish", "prelu", "_prelu_kernel", "rrelu_with_noise", "native_dropout",
      "bernoulli_", "bernoulli", "dropout", "feature_dropout", "_to_copy", "contiguous", "alias", "detach",
      "lift_fresh", "lift", "celu", "selu", "elu", "hardtanh", "relu6", "log_sigmoid_forward", "_conj",
      "uniform_", "normal_", "nan_to_num", "lerp", "addcmul", "addcdiv", "clamp", "clamp_")  # fmt: skip
def same_place(run: Labeller, operation: Operation) -> Value:
    """Element-wise operators that PyTorch does not tag as such."""
    if operation_name(operation.func) in ("prelu", "_prelu_kernel"):
        return _prelu(run, operation)
    return pointwise(run, operation)


def _prelu(run: Labeller, operation: Operation) -> Value:
    x, weight = run.at(operation.args[0]), run.at(operation.args[1])
    if len(weight.shape) == 1 and weight.shape[0] > 1:
        weight = _as_channel(weight, len(x.shape))
    return run.combine(operation, [x, weight], x.shape)


def _as_channel(vector: Value, rank: int, dim: int = 1) -> Value:
    """A vector of per-channel parameters, seen as a tensor that varies along `dim`."""
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(rank))
    return Value(shape, tuple(slot.reshape(shape) for slot in vector.slots if slot.size == vector.shape[0]))


@rule("copy_", "copy")
def copied(run: Labeller, operation: Operation) -> Value:
    """The source's labels replace the target's, except that both must keep the same shape."""
    target, source = run.at(operation.args[0]), run.at(operation.args[1])
    shape = run.out_shape(operation)
    if not target.slots and len(target.free) == sum(size > 1 for size in target.shape):
        return run.combine(operation, [source, Value(shape, free=_all_dims(shape))], shape)
    return run.combine(operation, [target, source], shape)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "fill_", "zero_",
      "scalar_tensor", "empty_strided", "new_empty_strided", "full_like", "zeros_like", "ones_like",
      "empty_like")  # fmt: skip
def filled(run: Labeller, operation: Operation) -> Value:
    """One number everywhere: any extent would do."""
    shape = run.out_shape(operation)
    return Value(shape, free=_all_dims(shape), constant=True)


def _all_dims(shape: tuple[int, ...]) -> frozenset[int]:
    return frozenset(dim for dim, size in enumerate(shape) if size > 1)


@rule("arange", "linspace", "rand", "randn", "randint", "randperm", "eye", "tril", "triu", "tril_indices")
def made(run: Labeller, operation: Operation) -> Value:
    """Numbers that come from nowhere: of a fixed size."""
    for leaf in _tensor_arguments(operation):
        run.freeze_value(run.at(leaf), f"{run.describe(operation)} depends on the position")
    return Value(run.out_shape(operation))


@rule("rand_like", "randn_like")
def noise(run: Labeller, operation: Operation) -> Value:
    """Random numbers in the shape of another tensor."""
    return pointwise(run, operation)


# -- shapes ------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "unflatten", "flatten",
      "squeeze", "unsqueeze", "squeeze_", "unsqueeze_", "view_as", "reshape_as")  # fmt: skip
def reshaped(run: Labeller, operation: Operation) -> Value:
    """The same elements in the same order under another shape."""
    x = run.at(operation.args[0])
    shape = run.out_shape(operation)
    if x.shape == shape:
        return x
    slots = [reshape_slot(slot, x.shape, shape) for slot in x.slots]
    free = set()
    for old_dims, new_dims in matching_dims(x.shape, shape):
        if all(not x.is_solid(dim) for dim in old_dims):
            free |= {dim for dim in new_dims if shape[dim] > 1}
    value = run.make(operation, shape, slots, frozenset(free))
    if "squeeze" not in operation_name(operation.func):
        _note_dims(run, operation, value)
    return value


def _note_dims(run: Labeller, operation: Operation, value: Value) -> None:
    for dim in range(len(value.shape)):
        slot = value.slot_at(dim)
        if slot is not None:
            note_size(run, operation, slot, dim)


@rule("as_strided", "as_strided_", "as_strided_copy")
def restrided(run: Labeller, operation: Operation) -> Value | list[Value]:
    """The same shape in another memory layout; anything else has no rule."""
    x = run.at(operation.args[0])
    return x if x.shape == run.out_shape(operation) else unknown(run, operation)


@rule("permute", "transpose", "t", "movedim", "transpose_", "t_", "permute_copy", "transpose_copy", "numpy_T",
      "adjoint", "swapaxes")  # fmt: skip
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
    return Value(shape, tuple(slot.transpose(order) for slot in x.slots), free, x.constant)


@rule("expand", "expand_copy", "expand_as", "broadcast_to")
def expanded(run: Labeller, operation: Operation) -> Value:
    """Repetition along dimensions of extent 1; such a dimension stays free."""
    shape = run.out_shape(operation)
    x = aligned(run.at(operation.args[0]), len(shape))
    repeated = {dim for dim, size in enumerate(shape) if size > 1 and x.shape[dim] == 1}
    value = Value(shape, x.slots, x.free | repeated, x.constant)
    _note_dims(run, operation, value)
    return value


@rule("repeat", "tile")
def repeated(run: Labeller, operation: Operation) -> Value:
    """Copies side by side."""
    shape, times = run.out_shape(operation), operation.args[1]
    x = aligned(run.at(operation.args[0]), len(shape))
    times = [1] * (len(shape) - len(times)) + list(times)
    slots = []
    for slot in x.slots:
        slots.append(np.tile(slot, [n if slot.shape[d] > 1 else 1 for d, n in enumerate(times)]))
    free = x.free | {dim for dim, n in enumerate(times) if n > 1 and x.shape[dim] == 1}
    return run.make(operation, shape, slots, frozenset(free))


@rule("repeat_interleave")
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


# -- parts and joins ---------------------------------------------------------------------------------------


@rule("select", "select_copy")
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
            run.table.freeze(slot, f"{run.describe(operation)} picks a single channel")
            continue
        slots.append(compress(slot.take(index if slot.shape[dim] > 1 else 0, axis=dim)))
    free = frozenset(d - (d > dim) for d in x.free if d != dim)
    return run.make(operation, shape, slots, free)


@rule("unbind", "unbind_copy")
def unbound(run: Labeller, operation: Operation) -> list[Value]:
    """Every position of a dimension on its own."""
    x = run.at(operation.args[0])
    dim = wrap(arguments(operation)["dim"], len(x.shape))
    return [_select(run, operation, x, dim, index) for index in range(x.shape[dim])]


@rule("slice", "slice_copy", "narrow")
def sliced(run: Labeller, operation: Operation) -> Value:
    """A range of a dimension. Ranges that divide it evenly are taken as chunks of equal width."""
    named = arguments(operation)
    x = run.at(operation.args[0])
    dim = wrap(named["dim"], len(x.shape))
    size = x.shape[dim]
    if "length" in named:
        start, step, end = named["start"], 1, named["start"] + named["length"]
    else:
        start, end, step = slice(named["start"], named["end"], named["step"]).indices(size)
    shape = (*x.shape[:dim], len(range(start, end, step)), *x.shape[dim + 1 :])
    slot = x.slot_at(dim)
    if shape == x.shape or slot is None:
        return Value(shape, x.slots, x.free & _all_dims(shape), x.constant)
    slot = _couple_slices(run, operation, slot, dim, range(start, end, step), size)
    part = compress(slot.take(np.arange(start, end, step), axis=dim))
    others = [other for other in x.slots if other.shape[dim] == 1]
    return run.make(operation, shape, [*others, part], x.free)


def _couple_slices(
    run: Labeller, operation: Operation, slot: Slot, dim: int, taken: range, size: int
) -> Slot:
    """Tie channels so that a slice still cuts in the same places when some are gone."""
    length, step = len(taken), abs(taken.step)
    atoms = np.moveaxis(slot, dim, -1)
    if step > 1:
        if size % step == 0:
            run.table.unite_along(atoms.reshape(*atoms.shape[:-1], size // step, step), (atoms.ndim,))
        else:
            run.table.freeze(slot, f"{run.describe(operation)} takes every {step}th channel")
        return slot
    even = length and size % length == 0 and taken.start % length == 0
    if even and run.choice(operation, slot, "even") == "even":
        blocks = atoms.reshape(*atoms.shape[:-1], size // length, length)
        run.table.unite_along(blocks, (blocks.ndim - 2,))
    note_size(run, operation, slot.take(range(taken.start), axis=dim), dim)
    note_size(run, operation, slot.take(range(taken.start + length), axis=dim), dim)
    note_size(run, operation, slot.take(taken, axis=dim), dim)
    return slot


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy",
      "unsafe_split_with_sizes")  # fmt: skip
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
    values, start = [], 0
    for size in sizes:
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        slots = list(others)
        if slot is not None:
            part = slot.take(range(start, start + size), axis=dim)
            note_size(run, operation, part, dim)
            slots.append(compress(part))
        values.append(run.make(operation, shape, slots, x.free & _all_dims(shape)))
        start += size
    return values


@rule("glu")
def gated(run: Labeller, operation: Operation) -> Value:
    """The first half times the sigmoid of the second."""
    x = run.at(operation.args[0])
    dim = wrap(arguments(operation)["dim"], len(x.shape))
    shape, slot = run.out_shape(operation), x.slot_at(dim)
    slots = [other for other in x.slots if other.shape[dim] == 1]
    if slot is not None:
        first, second = np.split(slot, 2, axis=dim)
        run.table.unite(
            first, second, f"{run.describe(operation)} multiplies channels that cannot be removed"
        )
        slots.append(compress(first))
    return run.make(operation, shape, slots, x.free & _all_dims(shape))


@rule("cat", "concat", "concatenate")
def joined(run: Labeller, operation: Operation) -> Value:
    """Tensors side by side along a dimension."""
    shape = run.out_shape(operation)
    parts = [run.at(ref) for ref in operation.args[0] if run.at(ref).shape != (0,)]
    return _join(run, operation, parts, wrap(arguments(operation)["dim"], len(shape)), shape)


@rule("stack")
def stacked(run: Labeller, operation: Operation) -> Value:
    """Tensors side by side along a new dimension."""
    shape = run.out_shape(operation)
    dim = wrap(arguments(operation)["dim"], len(shape))
    parts = []
    for ref in operation.args[0]:
        x = run.at(ref)
        one = (*x.shape[:dim], 1, *x.shape[dim:])
        free = frozenset(d + (d >= dim) for d in x.free)
        parts.append(Value(one, tuple(np.expand_dims(slot, dim) for slot in x.slots), free, x.constant))
    return _join(run, operation, parts, dim, shape)


def _join(run: Labeller, operation: Operation, parts: list[Value], dim: int, shape: tuple[int, ...]) -> Value:
    """Labels along `dim` are strung together; those along other dimensions are the same for all parts."""
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
        across.append(Value(rest, others, part.free | frozenset(solid_through), part.constant))
    outer = tuple(1 if d == dim else size for d, size in enumerate(shape))
    value = run.combine(operation, across, outer)
    slots = list(value.slots)
    if strung or any(slot.shape[dim] > 1 for part in parts for slot in part.slots):
        extents = [max(piece.shape[d] for piece in pieces) for d in range(len(shape))]
        full = [
            np.broadcast_to(p, [p.shape[d] if d == dim else e for d, e in enumerate(extents)]) for p in pieces
        ]
        slots.append(compress(np.concatenate(full, axis=dim)))
    free = {d for d in range(len(shape)) if d != dim and all(d in part.free for part in parts)}
    return run.make(operation, shape, slots, frozenset(free))


@rule("constant_pad_nd", "pad")
def padded(run: Labeller, operation: Operation) -> Value:
    """A border of one value. Along channels its width may have to follow: it gets atoms of its own."""
    x, pads = run.at(operation.args[0]), list(operation.args[1])
    shape = run.out_shape(operation)
    rank = len(shape)
    slots = list(x.slots)
    for position in range(len(pads) // 2):
        dim, before, after = rank - 1 - position, pads[2 * position], pads[2 * position + 1]
        index = next((i for i, slot in enumerate(slots) if slot.shape[dim] > 1), None)
        if index is not None and (before or after):
            slots[index] = _pad_slot(run, operation, slots[index], dim, before, after)
    return run.make(operation, shape, slots, x.free & _all_dims(shape))


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


@rule("flip")
def flipped(run: Labeller, operation: Operation) -> Value:
    """Reversed order along some dimensions."""
    x = run.at(operation.args[0])
    dims = dim_list(operation.args[1], len(x.shape))
    return Value(x.shape, tuple(np.flip(slot, dims) for slot in x.slots), x.free, x.constant)


@rule("roll")
def rolled(run: Labeller, operation: Operation) -> Value:
    """A cyclic shift: free in space; along channels its distance is a fixed number."""
    x = run.at(operation.args[0])
    dims = dim_list(arguments(operation)["dims"], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} shifts channels by a fixed number", dims)
    return x if dims else Value(x.shape)


@rule("pixel_shuffle")
def pixel_shuffled(run: Labeller, operation: Operation) -> Value:
    """Blocks of r² channels become r×r pixels: the channels of a block go together."""
    x, factor = run.at(operation.args[0]), operation.args[1]
    rank = len(x.shape)
    blocks = run.collapse(x, rank - 3).reshape(-1, factor * factor)
    return run.make(
        operation, run.out_shape(operation), [along(run.table.unite_along(blocks, (1,)), rank - 3, rank)]
    )


@rule("pixel_unshuffle")
def pixel_unshuffled(run: Labeller, operation: Operation) -> Value:
    """Each channel becomes r² channels."""
    x, factor = run.at(operation.args[0]), operation.args[1]
    rank = len(x.shape)
    atoms = np.repeat(run.collapse(x, rank - 3), factor * factor)
    return run.make(operation, run.out_shape(operation), [along(atoms, rank - 3, rank)])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffled(run: Labeller, operation: Operation) -> Value:
    """(groups, width) channels in the order (width, groups): equal positions of all groups go together."""
    x, groups = run.at(operation.args[0]), operation.args[1]
    table = run.collapse(x, 1).reshape(groups, -1)
    run.table.unite_along(table, (0,))
    return run.make(operation, x.shape, [along(table.T.reshape(-1), 1, len(x.shape))])


@rule("im2col")
def patches(run: Labeller, operation: Operation) -> Value:
    """Every kernel position of every channel becomes a channel."""
    x, kernel = run.at(operation.args[0]), operation.args[1]
    atoms = np.repeat(run.collapse(x, 1), math.prod(kernel))
    return run.make(operation, run.out_shape(operation), [along(atoms, 1, 3)])


@rule("unfold")
def windows(run: Labeller, operation: Operation) -> Value:
    """Sliding windows over one dimension, as a new last dimension."""
    x = run.at(operation.args[0])
    dim = wrap(operation.args[1], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} slides over channels", (dim,))
    slots = [slot[..., None] for slot in x.slots if slot.shape[dim] == 1]
    return run.make(operation, run.out_shape(operation), slots)


@rule("index", "index_select", "gather", "embedding", "take_along_dim")
def looked_up(run: Labeller, operation: Operation) -> Value | list[Value]:
    """Table look-up. Dimensions that are indexed have a fixed size; labels along the others pass."""
    x = run.at(operation.args[0])
    name = operation_name(operation.func)
    reason = f"{run.describe(operation)} looks its channels up by number"
    if name == "index":
        return _advanced_index(run, operation, x, reason)
    if name == "embedding":
        run.freeze_value(x, reason, (0,))
        shape = run.out_shape(operation)
        slots = [
            along(slot.reshape(-1), len(shape) - 1, len(shape)) for slot in x.slots if slot.shape[0] == 1
        ]
        return run.make(operation, shape, slots)
    if name == "index_select":
        dim = wrap(operation.args[1], len(x.shape))
        run.freeze_value(x, reason, (dim,))
        return run.make(operation, run.out_shape(operation), [s for s in x.slots if s.shape[dim] == 1])
    return unknown(run, operation)


def _advanced_index(run: Labeller, operation: Operation, x: Value, reason: str) -> Value | list[Value]:
    refs = list(operation.args[1]) + [None] * (len(x.shape) - len(operation.args[1]))
    indexed = tuple(dim for dim, ref in enumerate(refs) if ref is not None)
    shapes = [run.info(refs[dim].value).shape for dim in indexed]
    booleans = any(
        (data := run.info(refs[d].value).data) is None or data.dtype == torch.bool for d in indexed
    )
    adjacent = indexed == tuple(range(indexed[0], indexed[-1] + 1)) if indexed else False
    if booleans or not adjacent:
        return unknown(run, operation)
    run.freeze_value(x, reason, indexed)
    rank = len(np.broadcast_shapes(*shapes))
    slots = []
    for slot in x.slots:
        if all(slot.shape[dim] == 1 for dim in indexed):
            front, back = slot.shape[: indexed[0]], slot.shape[indexed[-1] + 1 :]
            slots.append(slot.reshape((*front, *[1] * rank, *back)))
    return run.make(operation, run.out_shape(operation), slots)


# -- contractions ------------------------------------------------------------------------------------------


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
    return run.combine(operation, [value, _as_channel(run.at(named["bias"]), len(shape))], shape)


def _by_blocks(run: Labeller, operation: Operation, incoming: np.ndarray, groups: int) -> bool:
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
    if _by_blocks(run, operation, incoming, groups):
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
    if _by_blocks(run, operation, incoming, groups):
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


# -- reductions --------------------------------------------------------------------------------------------


@rule("sum", "nansum")
def summed(run: Labeller, operation: Operation) -> Value:
    """A sum loses nothing when zeros leave it: labels of the summed dimensions end here."""
    return _reduced(run, operation, ends=True)


@rule("mean", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm", "all", "any",
      "max", "min", "median", "argmax", "argmin", "var_mean", "std_mean", "aminmax")  # fmt: skip
def statistic(run: Labeller, operation: Operation) -> list[Value]:
    """Statistics change when members leave: over channels they freeze them."""
    value = _reduced(run, operation, ends=False)
    return [value] * len(operation.outputs)


def _reduced(run: Labeller, operation: Operation, ends: bool) -> Value:
    named = arguments(operation)
    tensors = _tensor_arguments(operation)
    if len(tensors) > 1:  # the element-wise maximum of two tensors
        return pointwise(run, operation)
    x = run.at(tensors[0])
    rank = len(x.shape)
    dims = dim_list(named.get("dim"), rank)
    slots = []
    for slot in x.slots:
        inside = tuple(dim for dim in dims if slot.shape[dim] > 1)
        if not inside:
            slots.append(slot)
        elif len(inside) == len(support(slot)):
            if ends:
                run.note_consumed(operation, slot)
            else:
                run.table.freeze(slot, f"{run.describe(operation)} runs over channels")
        else:
            slots.append(run.table.unite_along(slot, inside))
    if named.get("keepdim"):
        return run.make(operation, run.out_shape(operation), slots, frozenset(x.free - set(dims)))
    kept = [dim for dim in range(rank) if dim not in dims]
    slots = [slot.reshape([slot.shape[dim] for dim in kept]) for slot in slots]
    free = frozenset(kept.index(dim) for dim in x.free if dim in kept)
    return run.make(operation, run.out_shape(operation), slots, free)


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod")
def normalised(run: Labeller, operation: Operation) -> Value:
    """Softmax and the like: over channels they freeze them."""
    x = run.at(operation.args[0])
    dim = wrap(operation.args[1], len(x.shape))
    slots = []
    for slot in x.slots:
        if support(slot) == (dim,):
            run.table.freeze(slot, f"{run.describe(operation)} runs over channels")
        else:
            slots.append(run.table.unite_along(slot, (dim,)) if slot.shape[dim] > 1 else slot)
    return run.make(operation, x.shape, slots, x.free - {dim})


# -- space -------------------------------------------------------------------------------------------------


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool1d", "max_pool2d_with_indices",
      "max_pool3d_with_indices", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "_upsample_bilinear2d_aa",
      "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "upsample_nearest3d", "upsample_trilinear3d",
      "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "lp_pool2d",
      "mkldnn_max_pool2d", "_fft_r2c", "_fft_c2r", "_fft_c2c")  # fmt: skip
def in_space(run: Labeller, operation: Operation) -> list[Value]:
    """Operators that work on every channel's map on its own."""
    x = run.at(operation.args[0])
    name = operation_name(operation.func)
    spatial = int(next((digit for digit in name if digit in "123"), "2"))
    dims = tuple(range(len(x.shape) - spatial, len(x.shape)))
    if name.startswith("_fft"):
        dims = dim_list(operation.args[1], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} mixes positions along it", dims)
    slots = [slot for slot in x.slots if all(slot.shape[dim] == 1 for dim in dims)]
    value = run.make(operation, run.out_shape(operation), slots)
    return [value] * len(operation.outputs)


@rule("grid_sampler", "grid_sampler_2d")
def sampled(run: Labeller, operation: Operation) -> Value:
    """Resampling of every channel at the same points."""
    x, grid = run.at(operation.args[0]), run.at(operation.args[1])
    run.freeze_value(grid, f"{run.describe(operation)} takes its points from it")
    run.freeze_value(x, f"{run.describe(operation)} mixes positions along it", (2, 3))
    return run.make(operation, run.out_shape(operation), [s for s in x.slots if support(s) == (1,)])


# -- normalisation -----------------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm", "native_batch_norm_legit",
      "_batch_norm_with_update_functional", "_batch_norm_impl_index", "instance_norm")  # fmt: skip
def batch_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Per-channel scale and shift; its vectors carry the channels' atoms.

    In training mode on a reshaped weight (weight standardisation) the statistics run over the weight's
    input channels.
    """
    named = arguments(operation)
    x = run.at(named["input"])
    vectors = [
        named[key] for key in ("weight", "bias", "running_mean", "running_var") if named.get(key) is not None
    ]
    rank = len(x.shape)
    value = run.combine(operation, [x, *(_as_channel(run.at(ref), rank) for ref in vectors)], x.shape)
    if named.get("training", named.get("use_input_stats", False)) or named.get("running_mean") is None:
        for slot in x.slots:
            if slot.shape[1] == 1:
                _note_statistics(run, operation, slot)
    return [value, *[Value(run.info(out).shape if out is not None else ()) for out in operation.outputs[1:]]]


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Statistics over the last dimensions, channels among them: they are taken over the kept ones."""
    named = arguments(operation)
    x = run.at(named["input"])
    count = len(named["normalized_shape"])
    dims = range(len(x.shape) - count, len(x.shape))
    vectors = [run.at(named[key]) for key in ("weight", "bias") if named.get(key) is not None]
    value = run.combine(operation, [x, *vectors], x.shape)
    for slot in x.slots:
        if any(slot.shape[dim] > 1 for dim in dims):
            _note_statistics(run, operation, slot)
    return [value, *[Value(run.info(out).shape if out is not None else ()) for out in operation.outputs[1:]]]


@rule("native_group_norm", "group_norm")
def group_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Whole groups go where there are many (exact); else the same position of every group (statistics change)."""
    named = arguments(operation)
    x, groups = run.at(named["input"]), int(named.get("group", named.get("num_groups", 1)))
    vectors = [
        _as_channel(run.at(named[k]), len(x.shape)) for k in ("weight", "bias") if named.get(k) is not None
    ]
    value = run.combine(operation, [x, *vectors], x.shape)
    atoms = run.collapse(value, 1).reshape(groups, -1)
    if _by_blocks(run, operation, atoms.reshape(-1), groups):
        heads = run.table.unite_along(atoms, (1,)).reshape(-1)
        run.group_counts.append((operation.module, "num_groups", heads))
        note_size(run, operation, heads)
    else:
        run.table.unite_along(atoms, (0,))
        _note_statistics(run, operation, along(atoms.reshape(-1), 1, len(x.shape)))
    return [value, *[Value(run.info(out).shape if out is not None else ()) for out in operation.outputs[1:]]]


def _note_statistics(run: Labeller, operation: Operation, slot: Slot) -> None:
    trace = len(run.values) - 1
    use = StatisticsUse(trace, operation.index, operation.module, operation_name(operation.func), slot)
    run.statistics.append(use)


# -- writing through views ---------------------------------------------------------------------------------


def written_through(run: Labeller, operation: Operation) -> Value:
    """A tensor after a part of it was written through a view."""
    assert operation.writes_to is not None
    before, chain, _ = operation.writes_to
    whole, part = run.at(before), run.values[-1][operation.outputs[0]]  # type: ignore[index]
    assert part is not None
    return _write(run, operation, whole, part, chain) if part.slots or whole.slots else whole


def _write(run: Labeller, operation: Operation, whole: Value, part: Value, chain: tuple[Any, ...]) -> Value:
    """Follow the chain of views with positions of the whole tensor in place of its numbers."""
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
    labels = np.broadcast_to(whole.slots[0] if whole.slots else np.array(-1), whole.shape).reshape(-1).copy()
    old = labels[viewed.numpy().reshape(-1)]
    new = np.broadcast_to(part.slots[0] if part.slots else np.array(-1), part.shape).reshape(-1)
    if np.array_equal(old, new):
        return whole
    if not whole.slots and part.slots:  # a fresh tensor: what is not written yet is as wide as it must be
        labels = _fresh_labels(run, operation, whole, part, viewed)
    labels[viewed.numpy().reshape(-1)] = new
    return run.make(operation, whole.shape, [compress(labels.reshape(whole.shape))], whole.free)


def _fresh_labels(run: Labeller, operation: Operation, whole: Value, part: Value, viewed: Any) -> np.ndarray:
    """Labels for a tensor that only repeats one number, along the dimension that the part is labelled in."""
    dims = support(part.slots[0])
    dim = dims[0] if len(dims) == 1 else -1
    if len(part.shape) != len(whole.shape) or dim not in whole.free:
        return np.full(math.prod(whole.shape), -1, dtype=np.int64)
    atoms = along(run.table.new(whole.shape[dim]), dim, len(whole.shape))
    note_size(run, operation, atoms, dim)
    return np.broadcast_to(atoms, whole.shape).reshape(-1).copy()


RULES["write"] = written_through
