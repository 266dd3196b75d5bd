"""Operators that read or write positions given by another tensor: table look-ups, gathers, scatters.

The index gives a fixed number of positions, so labels along the indexed dimensions stay. Labels along the others pass
through: the index of a `gather` may repeat along channels, and is then as wide as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pruning.engine.labeller import Labeller, along
from pruning.engine.labels import Slot, Value
from pruning.engine.operators.register import arguments, operator, unknown, within, wrap
from pruning.engine.traces import Operation, Ref


def _reason(run: Labeller, operation: Operation) -> str:
    return f"{run.describe(operation)} looks its channels up by number"


@operator("embedding")
def embedded(run: Labeller, operation: Operation) -> Value:
    """Rows of a table, as a new last dimension."""
    table = run.at(operation.args[0])
    shape = run.out_shape(operation)
    slots = within(run, table, (0,), _reason(run, operation))
    last = len(shape) - 1
    return run.make(operation, shape, [along(slot.reshape(-1), last, len(shape)) for slot in slots])


@operator("index_select")
def picked(run: Labeller, operation: Operation) -> Value:
    """Some positions of one dimension."""
    x = run.at(operation.args[0])
    dim = wrap(operation.args[1], len(x.shape))
    slots = within(run, x, (dim,), _reason(run, operation))
    return run.make(operation, run.out_shape(operation), list(slots), x.free - {dim})


@operator("gather")
def gathered(run: Labeller, operation: Operation) -> Value:
    """Along one dimension the positions that the index names, for every position of the others."""
    named = arguments(operation)
    shape = run.out_shape(operation)
    parts = _beside(run, operation, wrap(named["dim"], len(shape)), shape, [named["self"]])
    return run.combine(operation, [*parts, run.at(named["index"])], shape)


@operator(
    "scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ index_copy "
    "index_copy_ index_fill index_fill_"
)
def scattered(run: Labeller, operation: Operation) -> Value:
    """A tensor with some positions along one dimension written."""
    named = arguments(operation)
    shape = run.out_shape(operation)
    sources = [named[key] for key in ("index", "src", "source") if isinstance(named.get(key), Ref)]
    sources = [ref for ref in sources if len(run.info(ref.value).shape) == len(shape)]
    parts = _beside(run, operation, wrap(named["dim"], len(shape)), shape, [named["self"], *sources])
    return run.combine(operation, parts, shape)


def _beside(
    run: Labeller, operation: Operation, dim: int, shape: tuple[int, ...], refs: Sequence[Ref]
) -> list[Value]:
    """Tensors without the dimension of which positions are named; of others they may hold more than is taken."""
    found = []
    for ref in refs:
        x = run.at(ref)
        longer = [d for d, size in enumerate(x.shape) if d != dim and size != shape[d]]
        slots = within(run, x, (dim, *longer), _reason(run, operation))
        rest = tuple(1 if d == dim or d in longer else size for d, size in enumerate(x.shape))
        found.append(Value(rest, slots, x.free - {dim, *longer}))
    return found


@operator("index")
def indexed(run: Labeller, operation: Operation) -> Value | list[Value]:
    """`x[…]` with tensors of positions or booleans among the subscripts."""
    x = run.at(operation.args[0])
    shape = run.out_shape(operation)
    layout = _Layout.of(run, operation, len(x.shape))
    if layout is None:
        return unknown(run, operation)
    slots = within(run, x, layout.consumed, _reason(run, operation))
    free = frozenset(layout.after(dim) for dim in x.free if dim not in layout.consumed)
    return run.make(operation, shape, [layout.moved(slot) for slot in slots], free)


@operator("index_put index_put_ _index_put_impl_ _unsafe_index_put")
def put(run: Labeller, operation: Operation) -> Value | list[Value]:
    """`x[…] = values`, or `+=`."""
    x, values = run.at(operation.args[0]), run.at(operation.args[2])
    layout = _Layout.of(run, operation, len(x.shape))
    if layout is None:
        return unknown(run, operation)
    reason = _reason(run, operation)
    kept = within(run, x, layout.consumed, reason)
    rank = len(x.shape) - len(layout.consumed) + layout.rank
    if len(values.shape) > rank:
        return unknown(run, operation)
    extra = rank - len(values.shape)
    given = Value((1,) * extra + values.shape, tuple(s.reshape((1,) * extra + s.shape) for s in values.slots))
    inner = tuple(range(layout.front, layout.front + layout.rank))
    back = [layout.restored(slot) for slot in within(run, given, inner, reason)]
    sizes = [1 if dim in layout.consumed else given.shape[layout.after(dim)] for dim in range(len(x.shape))]
    rest = tuple(1 if dim in layout.consumed else size for dim, size in enumerate(x.shape))
    free = frozenset(
        dim for dim in range(len(x.shape)) if sizes[dim] > 1 and layout.after(dim) - extra in values.free
    )
    parts = [Value(rest, kept, x.free - set(layout.consumed)), Value(tuple(sizes), tuple(back), free)]
    return run.combine(operation, parts, x.shape)


class _Layout:
    """The positions of a tensor's dimensions after indexing.

    Args:
        rank: Number of dimensions that all indices together produce.
        consumed: Dimensions of the tensor that they replace.
        front: Position of the first of the new dimensions.
        num_dims: Number of dimensions of the tensor.
    """

    def __init__(self, rank: int, consumed: tuple[int, ...], front: int, num_dims: int) -> None:
        self.rank = rank
        self.consumed = consumed
        self.front = front
        self._num_dims = num_dims

    @classmethod
    def of(cls, run: Labeller, operation: Operation, num_dims: int) -> _Layout | None:
        """Return the layout of an `index`; None where an index carries labels itself."""
        dim, rank = 0, 0
        consumed: list[int] = []
        for ref in operation.args[1]:
            if ref is None:
                dim += 1
                continue
            info = run.info(ref.value)
            mask = info.dtype in (torch.bool, torch.uint8)
            run.freeze_value(run.at(ref), _reason(run, operation))  # as many are looked up as there are
            count = len(info.shape) if mask else 1
            consumed += range(dim, dim + count)
            dim += count
            rank = max(rank, 1 if mask else len(info.shape))
        together = consumed == list(range(consumed[0], consumed[-1] + 1))
        return cls(rank, tuple(consumed), consumed[0] if together else 0, num_dims)

    def after(self, dim: int) -> int:
        """Return the position after indexing of a dimension that is not indexed."""
        before = sum(d < dim for d in self.consumed)
        place = dim - before
        return place if place < self.front else place + self.rank

    def moved(self, slot: Slot) -> Slot:
        """Return a slot that does not vary along the indexed dimensions in the layout of the result."""
        sizes = [1] * (self._num_dims - len(self.consumed) + self.rank)
        for dim in self._others():
            sizes[self.after(dim)] = slot.shape[dim]
        return slot.reshape(sizes)

    def restored(self, slot: Slot) -> Slot:
        """Invert `moved`."""
        sizes = [1] * self._num_dims
        for dim in self._others():
            sizes[dim] = slot.shape[self.after(dim)]
        return slot.reshape(sizes)

    def _others(self) -> Iterable[int]:
        return (dim for dim in range(self._num_dims) if dim not in self.consumed)
