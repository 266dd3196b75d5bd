"""Runs a recorded forward pass on channel labels instead of numbers.

The rules for the single operators are in `operators/`; this file holds what they share: the label of every value, the
atoms of every parameter, and the records made along the way (layers with their costs, statistics over channels,
integers that are widths).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from pruning.engine.labels import AtomTable, Slot, Value, join_slots, make_value, support
from pruning.engine.traces import Operation, Ref, TensorInfo, Trace

Rule = Callable[["Labeller", Operation], "Value | list[Value]"]
Policy = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Label rules.

    Attributes:
        of: The rule of an operator.
        unknown: The rule for operators without one: everything they touch stays.
        write: The rule for a tensor after a part of it was written through a view.
    """

    of: Callable[[OpOverload], Rule]
    unknown: Rule
    write: Rule


#: Operators that take nothing but a shape from a tensor.
_LIKE = frozenset(
    "rand_like randn_like full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty".split()
)
#: Operators whose input nobody reads if nobody reads their result.
_PARTS = frozenset("slice select unsqueeze squeeze detach alias narrow".split())
_MOST_CHANNELS = 1 << 16  # a longer dimension is a flattened tensor, not channels


def policy_key(trace: int, operation: int, kind: str) -> str:
    """Return the key of a choice: which operator of which pass, and what kind of choice."""
    return f"{trace}:{operation}:{kind}"


@dataclasses.dataclass(frozen=True)
class SizeUse:
    """A whole number among an operator's arguments that counts channels: it is `len(atoms)`.

    `atoms` is a vector, or a label array of which only the extent along `dim` is counted. `where` names the operator
    and its line; `written` says that the number itself stands in that line.
    """

    module: str
    stack: tuple[str, ...]
    operator: str
    atoms: np.ndarray
    dim: int = 0
    where: str = ""
    written: bool = False

    def said_after(self, message: str) -> str:
        """Say that the number is written in the code, after a message; "" if that names operator and line already."""
        line = self.where.rpartition("(")[2]
        known = f"({line}" in message and self.operator in message
        return "" if known else f"; {self.where} has {self.atoms.shape[self.dim]} written in the code"


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """A contraction (convolution, linear layer, attention product) and what its cost is proportional to.

    MACs = `constant` × Π over `axes` of the number of positions that are kept; `per_image` says that the
    constant counts all images of the traced batch, rather than work that is done once per pass.
    """

    trace: int
    operation: int
    module: str
    operator: str
    constant: int
    axes: tuple[np.ndarray, ...]
    produced: np.ndarray | None
    consumed: np.ndarray | None
    weight: str | None
    spatial: int
    per_image: bool


@dataclasses.dataclass(frozen=True)
class StatisticsUse:
    """Statistics that run over channels: LayerNorm, some GroupNorms, weight standardisation, a mean.

    `slot` holds the labels of the operator's input.
    """

    trace: int
    operation: int
    module: str
    operator: str
    slot: Slot


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way of coupling chosen among several, with the labels and module it concerns."""

    chosen: str
    atoms: np.ndarray
    module: str


class Labeller:
    """Label propagation over one or more traces of the same network, which share their parameters' atoms."""

    def __init__(self, rules: Rules, policy: Policy | None = None) -> None:
        self.table = AtomTable()
        self.parameter_atoms: dict[tuple[str, int], np.ndarray] = {}
        self.joint_slots: list[tuple[Slot, str]] = []
        self.consumptions: list[tuple[int, str, np.ndarray]] = []
        self.size_uses: list[SizeUse] = []
        self.splits: list[list[SizeUse]] = []
        self.layers: list[LayerUse] = []
        self.statistics: list[StatisticsUse] = []
        self.group_counts: list[tuple[str, str, np.ndarray]] = []
        self.choices: dict[str, Choice] = {}
        self.policy = policy or {}
        self.values: list[list[Value | None]] = []
        self._rules = rules
        self._trace: Trace | None = None
        self._kernels: set[str] = set()
        self._read: set[int] = set()
        # Number of pairs of atoms united after each operator that united any.
        self._united: list[tuple[int, Operation]] = []

    def copy(self) -> Labeller:
        """Return a copy of the labels that can be tied and frozen independently."""
        other = copy.copy(self)
        other.table = self.table.copy()
        other.parameter_atoms = dict(self.parameter_atoms)
        other.choices = dict(self.choices)
        return other

    # -- running -------------------------------------------------------------------------------------------

    def run(self, trace: Trace) -> None:
        """Propagate labels through one trace."""
        self._trace = trace
        self.values.append([None] * len(trace.tensors))
        self._kernels |= kernel_names(trace)
        self._read = read_values(trace)
        for value in trace.inputs:
            self.values[-1][value] = self._solid_input(value)
        for operation in trace.operations:
            before = self.table.num_pairs
            self._run_operation(operation)
            if self.table.num_pairs > before:
                self._united.append((self.table.num_pairs, operation))
        for value, module in trace.scaled:
            self._keep_width(value, module)
        for value in trace.outputs:
            for slot in self.at(value).slots:
                self.table.freeze(slot, "the network's output")

    def _keep_width(self, query: int, module: str) -> None:
        """Handle attention that scales by the width of its heads: heads may be removed, but not become narrower."""
        value = self.at(query)
        last = len(value.shape) - 1
        for slot in value.slots:
            if support(slot) == (last,):
                self.table.freeze(slot, f"scaled_dot_product_attention in {module!r} scales by their number")
            else:
                self.table.unite_along(slot, (last,))

    def _solid_input(self, value: int) -> Value:
        shape = self.info(value).shape
        slots = []
        if len(shape) > 1 and shape[1] > 1:
            atoms = self.table.new(shape[1])
            self.table.freeze(atoms, "the network's input")
            slots.append(along(atoms, 1, len(shape)))
        return Value(shape, tuple(slots))

    def _run_operation(self, operation: Operation) -> None:
        rule = self._rules.of(operation.func)
        first = operation.outputs[0] if operation.outputs else None
        # No rows (an expert without tokens, no boxes) are rows like others; nothing else may be empty.
        if first is not None and 0 in self.info(first).shape[1:]:
            rule = self._rules.unknown
        result = rule(self, operation)
        results = result if isinstance(result, list) else [result] * len(operation.outputs)
        for number, value in zip(operation.outputs, results, strict=False):
            if number is not None:
                self._set(number, value, operation)
        if operation.writes_to is not None:
            written = self._rules.write(self, operation)
            assert isinstance(written, Value)
            self.values[-1][operation.writes_to[2]] = written

    def _set(self, number: int, value: Value, operation: Operation) -> None:
        shape = self.info(number).shape
        if value.shape != shape:  # an output of another shape (indices, statistics): nothing is known of it
            value = Value(shape)
        self.values[-1][number] = value
        key = policy_key(len(self.values) - 1, operation.index, "keep")
        for slot in value.slots:
            if len(support(slot)) > 1:
                self.joint_slots.append((slot, key))

    # -- asking --------------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """The trace that is being run."""
        assert self._trace is not None
        return self._trace

    def info(self, value: int) -> TensorInfo:
        """Return the trace's record of a value."""
        return self.trace.tensors[value]

    def at(self, value: int | Ref) -> Value:
        """Return the labels of a value (or of the value a `Ref` points at)."""
        number = value.value if isinstance(value, Ref) else value
        known = self.values[-1][number]
        if known is None:
            known = self.values[-1][number] = self._first_seen(number)
        return known

    def _first_seen(self, number: int) -> Value:
        info = self.info(number)
        if info.name is None:
            return Value(info.shape, free=info.repeated)
        slots = []
        for dim, extent in enumerate(info.shape):
            if 1 < extent <= _MOST_CHANNELS and (dim < 2 or info.name not in self._kernels):
                slots.append(along(self.atoms_of(info.name, dim, extent), dim, len(info.shape)))
        return Value(info.shape, tuple(slots))

    def atoms_of(self, name: str, dim: int, extent: int) -> np.ndarray:
        """Return the atoms of one dimension of a parameter, buffer or plain tensor."""
        key = (name, dim)
        if key not in self.parameter_atoms:
            self.parameter_atoms[key] = self.table.new(extent)
        return self.parameter_atoms[key]

    def out_shape(self, operation: Operation, position: int = 0) -> tuple[int, ...]:
        """Return the shape of one of an operator's outputs."""
        number = operation.outputs[position]
        return () if number is None else self.info(number).shape

    def is_read(self, operation: Operation) -> bool:
        """Whether anything reads the numbers of an operator's first result, rather than its shape alone."""
        return operation.outputs[0] in self._read

    def describe(self, operation: Operation) -> str:
        """Format an operator for messages: `view in 'layer1.0.conv2' (model.py:57)`."""
        where = repr(operation.module) if operation.module else "the network itself"
        line = f" ({operation.line})" if operation.line else ""
        return f"{operation_name(operation.func)} in {where}{line}"

    def tied_by(self, atoms: np.ndarray) -> str:
        """Describe the operator that first united all channels of one parameter, or else two of them.

        Args:
            atoms: All atoms of one component.

        Returns:
            As `describe`; "" if no operator did, but a split dimension, or a number that counts the channels.
        """
        axes = np.full(self.table.num_atoms, -1, dtype=np.int64)
        for number, positions in enumerate(self.parameter_atoms.values()):
            axes[positions] = number
        # An atom that is no parameter's has a label of its own.
        axes = np.where(axes < 0, len(self.parameter_atoms) + np.arange(axes.size), axes)
        labels = np.full(axes.size, -1, dtype=np.int64)
        labels[atoms] = axes[atoms]
        for pair in self.table.unions_within(labels):
            for end, operation in self._united:
                if pair < end:
                    return self.describe(operation) + _of_groups(operation)
        return ""

    def choice(self, operation: Operation, atoms: np.ndarray, preferred: str) -> str:
        """Choose between two ways of coupling for an operator: as the policy says, else the preferred one."""
        key = policy_key(len(self.values) - 1, operation.index, "couple")
        chosen = self.policy.get(key, preferred)
        self.choices[key] = Choice(chosen, atoms, operation.module)
        return chosen

    def note_layer(
        self,
        operation: Operation,
        constant: int,
        axes: tuple[np.ndarray, ...],
        produced: np.ndarray | None,
        consumed: np.ndarray | None,
        weight: str | None,
        spatial: int,
    ) -> None:
        """Record a contraction and its cost (see `LayerUse`)."""
        out = operation.outputs[0]
        self.layers.append(
            LayerUse(
                trace=len(self.values) - 1,
                operation=operation.index,
                module=operation.module,
                operator=operation_name(operation.func),
                constant=constant,
                axes=axes,
                produced=produced,
                consumed=consumed,
                weight=weight,
                spatial=spatial,
                per_image=out is None or bool(self.info(out).derived),
            )
        )

    def note_statistics(self, operation: Operation, slot: Slot) -> None:
        """Record that statistics are taken over these labels (see `StatisticsUse`)."""
        trace = len(self.values) - 1
        name = operation_name(operation.func)
        self.statistics.append(StatisticsUse(trace, operation.index, operation.module, name, slot))

    def note_consumed(self, operation: Operation, atoms: np.ndarray) -> None:
        """Record that these labels end at an operator."""
        self.consumptions.append((len(self.values) - 1, operation.module, atoms.reshape(-1)))

    # -- making --------------------------------------------------------------------------------------------

    def make(
        self,
        operation: Operation,
        shape: tuple[int, ...],
        slots: list[Slot],
        free: frozenset[int] = frozenset(),
    ) -> Value:
        """Make a value with these labels."""
        return make_value(self.table, shape, slots, free, f"of {self.describe(operation)}")

    def freeze_value(self, value: Value, reason: str, dims: tuple[int, ...] | None = None) -> None:
        """Freeze all atoms of a value, or those along `dims`."""
        for slot in value.slots:
            if dims is None or any(slot.shape[dim] > 1 for dim in dims):
                self.table.freeze(slot, reason)

    def collapse(self, value: Value, dim: int) -> np.ndarray:
        """Return one label per position along `dim` (a vector), united over the slot's other dimensions."""
        slot = value.slot_at(dim)
        if slot is None:
            return np.full(value.shape[dim], -1, dtype=np.int64)
        others = tuple(axis for axis in support(slot) if axis != dim)
        return self.table.unite_along(slot, others).reshape(-1)

    def combine(self, operation: Operation, values: list[Value], shape: tuple[int, ...]) -> Value:
        """Combine values element by element with broadcasting: labels that meet are united."""
        values = [aligned(value, len(shape)) for value in values]
        where = self.describe(operation)
        # Slots that vary along a common dimension meet element by element and become one.
        merged: list[Slot] = []
        for value in values:
            for slot in value.slots:
                merged = self._merge_into(operation, merged, slot)
        # Another operand that extends along a dimension without labels there has a fixed size. A slot that is fixed
        # along all its dimensions can lose nothing; along some, it can lose whole slices of the others.
        kept = []
        for slot in merged:
            dims = support(slot)
            fixed = tuple(d for d in dims if any(v.is_solid(d) and v.slot_at(d) is None for v in values))
            if len(fixed) == len(dims) > 0:
                self.table.freeze(slot, f"{where} combines it with values of a fixed size")
            else:
                kept.append(self.table.unite_along(slot, fixed))
        free = [d for d in range(len(shape)) if shape[d] > 1 and not any(v.is_solid(d) for v in values)]
        return self.make(operation, shape, kept, frozenset(free))

    def _merge_into(self, operation: Operation, merged: list[Slot], slot: Slot) -> list[Slot]:
        apart = []
        for other in merged:
            common = set(support(other)) & set(support(slot))
            if not common:
                apart.append(other)
                continue
            left, slot = self._meeting(operation, other, slot, tuple(common))
            apart += left
        return [*apart, slot]

    def _meeting(
        self, operation: Operation, one: Slot, two: Slot, common: tuple[int, ...]
    ) -> tuple[list[Slot], Slot]:
        """Merge two slots that vary along common dimensions. Returns the slots that stay separate, and the merged one.

        Where channels of heads (h, d) meet labels that all heads share (d), either the latter stay and whole heads are
        removed, or the same positions of all heads are removed. Where (h, d) meets (h, e), either heads or the same
        positions of all heads are removed.
        """
        small, large = sorted((one, two), key=lambda slot: len(support(slot)))
        if len(support(large)) == len(common):  # along the same dimensions
            return [], join_slots(self.table, one, two)
        if len(support(small)) == len(common):
            if self.choice(operation, large, "dims") == "dims":
                return [], join_slots(self.table, one, two)
            self.table.freeze(small, f"{self.describe(operation)} takes it for all heads alike")
            return [], self.table.unite_along(large, common)
        if self.choice(operation, large, "heads") == "heads":
            return [], join_slots(self.table, one, two)
        return [self.table.unite_along(one, common)], self.table.unite_along(two, common)


def read_values(trace: Trace) -> set[int]:
    """Return the values whose elements matter. In `torch.ones_like(x[:, :1])` those of the slice of x do not."""
    read = set(trace.outputs)
    for operation in reversed(trace.operations):
        name = operation_name(operation.func)
        unread = name in _PARTS and read.isdisjoint(out for out in operation.outputs if out is not None)
        if name not in _LIKE and not unread:
            leaves = tree_leaves((operation.args, operation.kwargs))
            read.update(leaf.value for leaf in leaves if isinstance(leaf, Ref))
    return read


def origins(trace: Trace, value: int) -> Iterator[str]:
    """Yield the names of the parameters that a value is, or was computed from independently of the images."""
    info = trace.tensors[value]
    if info.name is not None:
        yield info.name
    maker = trace.maker(value)
    if info.name is None and not info.derived and maker is not None:
        for leaf in tree_leaves((maker.args, maker.kwargs)):
            if isinstance(leaf, Ref):
                yield from origins(trace, leaf.value)


def kernel_names(trace: Trace) -> set[str]:
    """Return the parameters of convolutions: their dimensions from the third on are the kernel's, not channels."""
    found: set[str] = set()
    for operation in trace.operations:
        if "convolution" in str(operation.func) and isinstance(operation.args[1], Ref):
            found.update(origins(trace, operation.args[1].value))
    return found


def along(atoms: np.ndarray, dim: int, rank: int) -> Slot:
    """Return a vector of atoms as a slot of a tensor of `rank` dimensions."""
    return atoms.reshape([-1 if d == dim else 1 for d in range(rank)])


def aligned(value: Value, rank: int) -> Value:
    """Return the value with leading dimensions of extent 1, as in broadcasting."""
    extra = rank - len(value.shape)
    if extra == 0:
        return value
    slots = tuple(slot.reshape((1,) * extra + slot.shape) for slot in value.slots)
    return Value((1,) * extra + value.shape, slots, frozenset(d + extra for d in value.free))


def is_pointwise(func: OpOverload) -> bool:
    """Whether PyTorch declares the operator element-wise; an in-place operator counts as its out-of-place form."""
    if torch.Tag.pointwise in func.tags:
        return True
    name = operation_name(func)
    if func.namespace != "aten" or not name.endswith("_"):
        return False
    plain = getattr(torch.ops.aten, name[:-1], None)
    overload = getattr(plain, func._overloadname, None)
    return overload is not None and torch.Tag.pointwise in overload.tags


def _of_groups(operation: Operation) -> str:
    """Say that a grouped convolution can lose channels only in step, as a shuffle of other sizes does not allow."""
    if operation_name(operation.func) != "convolution" or operation.args[8] == 1:
        return ""
    return f", whose {operation.args[8]} groups must lose the same positions each"


def operation_name(func: OpOverload) -> str:
    """`aten.add.Tensor` → `add`, `mylib.scale.default` → `mylib.scale`."""
    return str(func.overloadpacket).removeprefix("aten.")
