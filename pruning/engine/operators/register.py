"""The register of operators: one record each, and what the rules share.

An operator is defined in one place:

    @operator("mean", statistics=KEPT, keeps_offsets=averages_positions)
    @operator("amax amin var std", statistics=KEPT)
    def statistic(run, operation): ...

The decorated function is its label rule; the rest is optional (see `Operator`). `register_operator` does the same for
operators of other libraries. The kinds of operators, which attribution needs too, are in
`image_classification/models/operators.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves

from image_classification.config import check_setting
from image_classification.models.operators import declare
from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.labeller import Labeller, Rule, SizeUse, is_pointwise, operation_name
from pruning.engine.labels import Slot, Value, support
from pruning.engine.operators.unknowns import ConstantRule, elementwise
from pruning.engine.traces import Operation, Ref, Trace

#: (operator, arguments, keyword arguments, bool array that broadcasts to the input: what stays) → result.
KeptRule = Callable[[OpOverload, Args, Kwargs, np.ndarray], Outputs]
#: (trace, operation, number of the value that has the offset) → whether the result has it too.
OffsetRule = Callable[[Trace, Operation, int], bool]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The computation of statistics over the kept channels.

    Attributes:
        family: Name of the operators that are counted together in a pass, which identifies a single call.
        over_kept: Computes the operator from the kept elements alone.
    """

    family: str
    over_kept: KeptRule


@dataclasses.dataclass(frozen=True)
class Operator:
    """The engine's record of an operator.

    Attributes:
        label: Its label rule.
        statistics: The computation of its statistics over the kept channels; None: it takes none.
        constants: Its result on inputs with unknown elements (NaN); None: NaN propagates as in PyTorch.
        keeps_offsets: Whether a constant added to every channel of its first input is added to its result.
    """

    label: Rule
    statistics: Statistics | None = None
    constants: ConstantRule | None = None
    keeps_offsets: OffsetRule | None = None


#: Every overload that is known.
OPERATORS: dict[OpOverload, Operator] = {}
#: Label rules by schema name, for libraries that may not be imported.
_ELSEWHERE: dict[str, Rule] = {}
_BY_NAME: dict[str, Operator] = {}


def operator(
    names: str,
    *,
    statistics: Statistics | None = None,
    constants: ConstantRule | None = None,
    keeps_offsets: OffsetRule | None = None,
) -> Callable[[Rule], Rule]:
    """Register the decorated label rule for every overload of ATen operators (those that this PyTorch has).

    Args:
        names: The operators, separated by blanks.
        statistics, constants, keeps_offsets: See `Operator`.
    """

    def register(label: Rule) -> Rule:
        for name in names.split():
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None:
                _enter(packet, Operator(label, statistics, constants, keeps_offsets))
        return label

    return register


def elsewhere(names: str) -> Callable[[Rule], Rule]:
    """Register the decorated label rule for operators of a library that the engine does not import.

    Args:
        names: Their schema names (`torchvision::nms`), separated by blanks.
    """

    def register(label: Rule) -> Rule:
        _ELSEWHERE.update((name, label) for name in names.split())
        return label

    return register


def register_operator(
    operator: OpOverload | OpOverloadPacket,
    *,
    label: Rule | None = None,
    kind: str = "other",
    statistics: KeptRule | None = None,
    constants: ConstantRule | None = None,
    keeps_offsets: bool = False,
    nonnegative: bool = False,
    bounded: bool = False,
) -> None:
    """Register an operator of another library with the engine and the attribution methods.

    Args:
        operator: `torch.ops.mylib.scale.default`, or `torch.ops.mylib.scale` for all its overloads.
        label: `(run, operation)` → labels of its outputs: a `Value`, or a list of one for each output. May be left out
            for a pointwise operator that takes no vectors: it unites the labels of all tensors that it takes.
        kind: Its effect on a signal, which decides how attribution treats it: "linear" (sums, averages, maxima),
            "pointwise", "normalisation", "movement" or "other". Attribution differentiates linear operators and
            movements: give them a backward pass.
        statistics: `(operator, args, kwargs, kept)` → its result from the kept channels alone, for a label rule that
            says `run.note_statistics`.
        constants: `(operator, args, kwargs)` → its result where NaN stands for "depends on the image", for `shrink`.
            Only needed where a zero makes NaN irrelevant, or where the operator loses NaN.
        keeps_offsets: A constant added to every channel of its first argument is added to its result.
        nonnegative: No result is negative; some attribution rules use it.
        bounded: Its results are bounded; the same.

    Raises:
        SettingError: There is no such kind, or one that needs a label rule.
    """
    check_setting(
        label is not None or kind == "pointwise",
        "label",
        label,
        f"give the label rule of {operator}; only pointwise operators do without",
    )
    declare(_schema_name(operator), kind, nonnegative=nonnegative, bounded=bounded)
    if constants is None and kind == "pointwise":
        constants = elementwise
    _enter(
        operator,
        Operator(
            label or pointwise,
            None if statistics is None else Statistics(_schema_name(operator), statistics),
            constants,
            always if keeps_offsets else None,
        ),
    )


def always(trace: Trace, operation: Operation, value: int) -> bool:
    return True


def _overloads(operator: OpOverload | OpOverloadPacket) -> Iterator[OpOverload]:
    if isinstance(operator, OpOverload):
        yield operator
    else:
        for overload in operator.overloads():
            yield getattr(operator, overload)


def _schema_name(operator: OpOverload | OpOverloadPacket) -> str:
    return next(_overloads(operator))._schema.name


def _enter(operator: OpOverload | OpOverloadPacket, record: Operator) -> None:
    for overload in _overloads(operator):
        OPERATORS[overload] = record
        _BY_NAME[operation_name(overload)] = record


def operator_named(name: str) -> Operator | None:
    """Return the record of an operator by the name that `operation_name` gives it."""
    return _BY_NAME.get(name)


def label_rule(func: OpOverload) -> Rule:
    """Return the label rule of an operator: its own, the element-wise one, or the one for unknown operators."""
    if func in OPERATORS:
        return OPERATORS[func].label
    if func._schema.name in _ELSEWHERE:
        return _ELSEWHERE[func._schema.name]
    return pointwise if is_pointwise(func) else unknown


def keeps_offset(trace: Trace, operation: Operation, value: int) -> bool:
    """Whether a constant added to every channel of a value is added to the operation's first output too."""
    record = OPERATORS.get(operation.func)
    if record is None or record.keeps_offsets is None or operation.args[0] != Ref(value):
        return False
    return record.keeps_offsets(trace, operation, value)


def arguments(operation: Operation) -> Kwargs:
    """Return all arguments by their schema name, with defaults filled in."""
    return named_arguments(operation.func, operation.args, operation.kwargs)


def named_arguments(func: OpOverload, args: Sequence[object], kwargs: Kwargs) -> Kwargs:
    """Return the arguments of a call by their schema name, with defaults filled in."""
    schema = func._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema}
    for argument, value in zip(schema, args, strict=False):
        bound[argument.name] = value
    bound.update(kwargs)
    return bound


def wrap(dim: int, rank: int) -> int:
    """Return a dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def dim_list(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Return dimensions counted from the front; all of them for None or an empty list."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    return tuple(wrap(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims))


def note_size(run: Labeller, operation: Operation, atoms: np.ndarray, dim: int = 0) -> SizeUse:
    """Record that one of the operator's arguments is the number `atoms.shape[dim]`."""
    name, where = operation_name(operation.func), run.describe(operation)
    written = atoms.shape[dim] in operation.written
    use = SizeUse(operation.module, operation.stack, name, atoms, dim, where, written)
    run.size_uses.append(use)
    return use


def pointwise(run: Labeller, operation: Operation) -> Value:
    """Operators that PyTorch declares element-wise."""
    values = [run.at(leaf) for leaf in tensor_arguments(operation)]
    return run.combine(operation, values, run.out_shape(operation))


def unknown(run: Labeller, operation: Operation) -> list[Value]:
    """Operators without a rule: channels that enter one can no longer be removed."""
    for leaf in tensor_arguments(operation):
        run.freeze_value(run.at(leaf), f"{run.describe(operation)} is an operator without a rule")
    return [Value(run.info(out).shape if out is not None else ()) for out in operation.outputs]


def tensor_arguments(operation: Operation) -> list[Ref]:
    """Return every tensor among the arguments, nested ones too."""
    leaves = tree_leaves((operation.args, operation.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]


def as_channel(vector: Value, rank: int, dim: int = 1) -> Value:
    """Return a vector of per-channel parameters as a tensor that varies along `dim`."""
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(rank))
    return Value(shape, tuple(slot.reshape(shape) for slot in vector.slots if slot.size == vector.shape[0]))


def within(run: Labeller, x: Value, dims: Sequence[int], reason: str) -> tuple[Slot, ...]:
    """Return the slots that remain of a tensor whose positions along `dims` are mixed or addressed by number.

    Labels along these dimensions alone are frozen; labels that also vary along others are removed as a whole.
    """
    slots = []
    for slot in x.slots:
        if set(support(slot)) <= set(dims):
            run.table.freeze(slot, reason)
        else:
            slots.append(run.table.unite_along(slot, tuple(dims)))
    return tuple(slots)


def all_dims(shape: tuple[int, ...]) -> frozenset[int]:
    """Return the dimensions along which a tensor extends."""
    return frozenset(dim for dim, size in enumerate(shape) if size > 1)
