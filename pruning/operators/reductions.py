"""Sums and statistics along dimensions, softmax, cumulative sums."""

from __future__ import annotations

from pruning.labelling import Labeller, operation_name
from pruning.labels import Value, support
from pruning.operators.register import arguments, dim_list, pointwise, rule, tensor_arguments, wrap
from pruning.statistics import REDUCTIONS
from pruning.tracing import Operation


@rule("sum", "nansum")
def summed(run: Labeller, operation: Operation) -> Value:
    """A sum loses nothing when zeros leave it: labels of the summed dimensions end here."""
    return _reduced(run, operation, ends=True)


@rule("mean", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm", "all", "any",
      "max", "min", "median", "argmax", "argmin", "var_mean", "std_mean", "aminmax")  # fmt: skip
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
            elif operation_name(operation.func) in REDUCTIONS and len(inside) == 1:
                run.note_statistics(operation, slot)
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
