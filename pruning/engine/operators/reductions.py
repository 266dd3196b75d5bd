"""Sums and statistics along dimensions, softmax, cumulative sums."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.labeller import Labeller
from pruning.engine.labels import Slot, Value, support
from pruning.engine.operators.register import (
    OPERATORS,
    Statistics,
    arguments,
    dim_list,
    operator,
    pointwise,
    tensor_arguments,
    unknown,
    wrap,
)
from pruning.engine.traces import Operation, Trace


@operator("sum nansum")
def summed(run: Labeller, operation: Operation) -> Value:
    """A sum loses nothing when zeros leave it: labels of the summed dimensions end here."""
    return _reduced(run, operation, ends=True)


def _only_kept(x: Tensor, kept: np.ndarray) -> Tensor:
    """The slices of x that stay, along every dimension that `kept` varies in."""
    for dim in range(kept.ndim):
        if kept.shape[dim] > 1:
            index = torch.from_numpy(
                np.flatnonzero(kept.any(axis=tuple(d for d in range(kept.ndim) if d != dim)))
            )
            x = x.index_select(dim, index.to(x.device))
    return x


def reduce_kept(func: OpOverload, args: Args, kwargs: Kwargs, kept: np.ndarray) -> Outputs:
    """The reduction of the kept elements."""
    return func(_only_kept(args[0], kept), *args[1:], **kwargs)


def averages_positions(trace: Trace, operation: Operation, value: int) -> bool:
    """Whether a mean leaves images and channels apart; without dimensions it goes over everything."""
    dims = arguments(operation).get("dim")
    rank = len(trace.tensors[value].shape)
    return bool(dims) and all(dim >= 2 for dim in dim_list(dims, rank))


KEPT = Statistics("reduction", reduce_kept)


@operator("mean", statistics=KEPT, keeps_offsets=averages_positions)
@operator(
    "amax amin max min var std var_mean std_mean logsumexp linalg_vector_norm norm",
    statistics=KEPT,
)
@operator("prod all any median argmax argmin aminmax")
def statistic(run: Labeller, operation: Operation) -> list[Value]:
    """Statistics change when members leave: over channels they are taken over the kept ones, or freeze them."""
    value = _reduced(run, operation, ends=False)
    return [value] * len(operation.outputs)


def _reduced(run: Labeller, operation: Operation, ends: bool) -> Value:
    named = arguments(operation)
    tensors = tensor_arguments(operation)
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
            elif OPERATORS[operation.func].statistics is not None and len(inside) == 1:
                run.note_statistics(operation, slot)
            else:
                run.table.freeze(slot, f"{run.describe(operation)} runs over channels")
        elif not ends and len(inside) == 1 and _within_groups(run, operation, slot):
            others = tuple(dim for dim in support(slot) if dim not in inside)
            run.note_statistics(operation, run.table.unite_along(slot, others))
        else:
            slots.append(run.table.unite_along(slot, inside))
    if named.get("keepdim"):
        return run.make(operation, run.out_shape(operation), slots, frozenset(x.free - set(dims)))
    kept = [dim for dim in range(rank) if dim not in dims]
    slots = [slot.reshape([slot.shape[dim] for dim in kept]) for slot in slots]
    free = frozenset(kept.index(dim) for dim in x.free if dim in kept)
    return run.make(operation, run.out_shape(operation), slots, free)


def _within_groups(run: Labeller, operation: Operation, slot: Slot) -> bool:
    """Whether statistics of groups, (group, channel) in two dimensions, are taken over the channels kept of each.

    Otherwise whole groups go.
    """
    if OPERATORS[operation.func].statistics is None:
        return False
    return run.choice(operation, slot, "blocks") == "positions"


@operator("_softmax _safe_softmax _log_softmax softmax log_softmax cumsum cumprod cummax cummin logcumsumexp")
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


@operator("topk sort kthvalue")
def ordered(run: Labeller, operation: Operation) -> list[Value]:
    """The largest along a dimension, with their positions: over channels that freezes them."""
    named = arguments(operation)
    x = run.at(operation.args[0])
    shape = run.out_shape(operation)
    if len(shape) != len(x.shape):
        return unknown(run, operation)
    dim = wrap(named["dim"], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} runs over channels", (dim,))
    slots = [slot for slot in x.slots if slot.shape[dim] == 1]
    value = run.make(operation, shape, slots)
    return [value] * len(operation.outputs)
