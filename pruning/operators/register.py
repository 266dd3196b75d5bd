"""The register of rules, and what they share: reading arguments, noting sizes, the rules for all that has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pruning.labelling import Labeller, Rule, SizeUse, operation_name
from pruning.labels import Value
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


def note_size(run: Labeller, operation: Operation, atoms: np.ndarray, dim: int = 0) -> SizeUse:
    """Remember that `atoms.shape[dim]` stands among the operator's arguments as a number."""
    use = SizeUse(operation.module, operation.stack, operation_name(operation.func), atoms, dim)
    run.size_uses.append(use)
    return use


def pointwise(run: Labeller, operation: Operation) -> Value:
    """Operators that PyTorch declares element-wise."""
    values = [run.at(leaf) for leaf in tensor_arguments(operation)]
    return run.combine(operation, values, run.out_shape(operation))


def unknown(run: Labeller, operation: Operation) -> list[Value]:
    """Operators without a rule: what goes in can no longer be removed."""
    for leaf in tensor_arguments(operation):
        run.freeze_value(run.at(leaf), f"{run.describe(operation)} is an operator without a rule")
    return [Value(run.info(out).shape if out is not None else ()) for out in operation.outputs]


def tensor_arguments(operation: Operation) -> list[Ref]:
    """Every tensor among the arguments, nested ones too."""
    leaves = torch.utils._pytree.tree_leaves((operation.args, operation.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]


RULES["pointwise"] = pointwise
RULES["unknown"] = unknown


def as_channel(vector: Value, rank: int, dim: int = 1) -> Value:
    """A vector of per-channel parameters, seen as a tensor that varies along `dim`."""
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(rank))
    return Value(shape, tuple(slot.reshape(shape) for slot in vector.slots if slot.size == vector.shape[0]))


def all_dims(shape: tuple[int, ...]) -> frozenset[int]:
    """The dimensions along which a tensor extends."""
    return frozenset(dim for dim, size in enumerate(shape) if size > 1)
