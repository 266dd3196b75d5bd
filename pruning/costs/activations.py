"""A network's activations: their sizes as functions of the widths, their lifetimes, and the operators that read them.

The network runs twice on the example images: once recorded with channel labels (as for the channel graph), once with
the lifetime of every storage observed. Both runs execute the same operators, so the n-th operator of one is the n-th of
the other. The labels' atoms are translated to the graph's units through the parameters that both know.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from image_classification.config import SettingError
from pruning.engine.building import label
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.examples import Example
from pruning.engine.labeller import Labeller, LayerUse, operation_name
from pruning.engine.labels import Slot, Value, compress, support
from pruning.engine.operators import arguments
from pruning.engine.traces import Operation, Ref, Trace
from pruning.engine.tracing import record
from pruning.engine.undisturbed import set_trace_mode, undisturbed

#: Shapes, strides and similar settings of a layer, as plain data.
Geometry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Extent:
    """The size of a tensor: `factor` × Π over `vectors` of the number of kept positions."""

    factor: float
    vectors: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a convolution or linear layer, for measuring it in isolation.

    Attributes:
        name: Module and number of the contraction within it; the same before and after a rewrite.
        out_units, in_units: Units along the two dimensions its cost depends on; `in_units` is empty for layers
            that lose whole groups (depthwise convolutions), where one dimension follows from the other.
        geometry: All other settings that matter, as plain data: kind, traced shapes, stride and so on.
        rows: First dimension of its input, per image.
    """

    name: str
    out_units: np.ndarray
    in_units: np.ndarray
    geometry: Geometry
    rows: float


@dataclasses.dataclass(frozen=True)
class Activations:
    """The result of `trace_activations`; all sizes are per image.

    Attributes:
        allocations: Bytes of every storage derived from the images (including the images themselves).
        moments: (moments, allocations) bool: sets of storages that are alive together. Subsets of another set are left
            out, since they are never larger.
        kernels: Convolutions and linear layers, in order of execution.
        traffic: Elements read and written by each of the other operators; views are free.
    """

    allocations: list[Extent]
    moments: np.ndarray
    kernels: list[Kernel]
    traffic: list[Extent]


def trace_activations(model: nn.Module, example: Example, graph: ChannelGraph) -> Activations:
    """Run the network on an example, in evaluation mode, and describe its activations.

    Args:
        model: The network that the graph belongs to; not modified.
        example: Its arguments, one or two images.
        graph: Its channel graph, at the current widths.
    """
    with undisturbed(model):
        trace = record(model, example.args, example.kwargs)
        lives = _observe(model, example)
    labeller = label([trace])
    batch = trace.tensors[trace.inputs[0]].shape[0]
    sizes = _Sizes(trace, labeller, graph, batch)
    kernels = _kernels(trace, labeller, sizes)
    contracted = {number for number, _ in kernels}
    allocations, moments = _allocations(trace, lives, sizes, batch)
    traffic = _traffic(trace, sizes, contracted)
    return Activations(allocations, moments, [kernel for _, kernel in kernels], traffic)


# -- sizes -------------------------------------------------------------------------------------------------


class _Sizes:
    """Sizes of traced values in terms of the graph's units."""

    def __init__(self, trace: Trace, labeller: Labeller, graph: ChannelGraph, batch: int) -> None:
        self._trace = trace
        self._labeller = labeller
        self.batch = batch
        self._unit_of_atom = _units_of_atoms(labeller, graph)

    def units(self, slot: Slot) -> np.ndarray:
        """Return a value's labels as unit ids, with extent 1 along every dimension they do not depend on."""
        return compress(np.where(slot < 0, -1, self._unit_of_atom[np.maximum(slot, 0)]))

    def along(self, number: int, dim: int) -> np.ndarray:
        """Return the units along one dimension of a value."""
        shape = self._trace.tensors[number].shape
        value = self._labeller.values[0][number] or Value(shape)
        slot = value.slot_at(dim)
        units = np.array([-1]) if slot is None else self.units(slot)
        vector = units.reshape(-1) if support(units) in ((), (dim,)) else np.array([-1])
        return np.broadcast_to(vector, (shape[dim],))

    def elements(self, number: int) -> Extent:
        """Return the number of elements of a value per image.

        If the labels depend on two dimensions at once (never in a rectangular tensor of a verified graph), the value
        counts as fixed.
        """
        shape = self._trace.tensors[number].shape
        value = self._labeller.values[0][number] or Value(shape)
        vectors = []
        carried = set()
        for slot in value.slots:
            units = self.units(slot)
            dims = support(units)
            if len(dims) == 1 and units.max() >= 0:
                vectors.append(units.reshape(-1))
                carried.add(dims[0])
        rest = math.prod(size for dim, size in enumerate(shape) if dim not in carried)
        return Extent(rest / self.batch, tuple(vectors))


def _units_of_atoms(labeller: Labeller, graph: ChannelGraph) -> np.ndarray:
    """Return the unit of every atom, (num_atoms,), -1 for atoms without a unit."""
    num_atoms = labeller.table.num_atoms
    unit_of_atom = np.full(num_atoms, -1, dtype=np.int64)
    of_parameter = np.zeros(num_atoms, dtype=bool)
    for atoms in labeller.parameter_atoms.values():
        of_parameter[atoms] = True
    for axis in graph.axes:
        if (axis.tensor, axis.dim) in labeller.parameter_atoms:
            unit_of_atom[labeller.parameter_atoms[axis.tensor, axis.dim]] = axis.units

    # Atoms of parameters get their unit from the graph. Others (of padding, say) belong to the unit of any atom in the
    # same component; -1 is the smallest value, so the maximum finds it.
    root = labeller.table.components()
    of_component = np.full(num_atoms, -1, dtype=np.int64)
    np.maximum.at(of_component, root, unit_of_atom)
    return np.where(of_parameter, unit_of_atom, of_component[root])


# -- lives -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Lives:
    """Lifetimes of all storages during a pass; storages are numbered.

    Attributes:
        born: (operator that allocated the storage, position among its outputs, bytes); operator -1 for inputs.
        alive: For every operator, the storages that are alive while it runs.
    """

    born: list[tuple[int, int, int]]
    alive: list[frozenset[int]]


class _Observer(TorchDispatchMode):
    """Follows every storage from the operator that allocates it until it is released."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.lives = _Lives([], [])
        self._operation = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        tensors = [*model.parameters(), *model.buffers()]
        self._own = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in tensors}

    def adopt(self, tensor: Tensor, operation: int, position: int) -> None:
        """Number the tensor's storage, unless it is already known or belongs to the network."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._alive and reference.cdata not in self._own:
            self._alive[reference.cdata] = (reference, len(self.lives.born))
            self.lives.born.append((operation, position, storage.nbytes()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for key in [key for key, (reference, _) in self._alive.items() if reference.expired()]:
            del self._alive[key]
        result = func(*args, **(kwargs or {}))
        returned = list(result) if isinstance(result, (tuple, list)) else [result]
        for position, tensor in enumerate(returned):
            if isinstance(tensor, Tensor):
                self.adopt(tensor, self._operation, position)
        self.lives.alive.append(frozenset(number for _, number in self._alive.values()))
        self._operation += 1
        return result


def _observe(model: nn.Module, example: Example) -> _Lives:
    set_trace_mode(model, False)
    observer = _Observer(model)
    for position, tensor in enumerate(example.tensors):
        observer.adopt(tensor, -1, position)
    with observer:
        example.run(model)
    return observer.lives


def _allocations(trace: Trace, lives: _Lives, sizes: _Sizes, batch: int) -> tuple[list[Extent], np.ndarray]:
    """Return the storages derived from the images, and the largest sets of them that are alive together."""
    operations = [operation for operation in trace.operations if not operation.replayed]
    if len(lives.alive) != len(operations):
        raise SettingError(
            "budget",
            "memory or latency",
            "the network must run the same operators every time, but two passes over the same images ran "
            f"{len(operations)} and {len(lives.alive)}. Use macs or params",
        )

    # Find the traced value that fills each storage, and thus the widths its size depends on. The storage may be larger
    # than the value (padding, a buffer): its bytes at the current widths are spread over the value's elements.
    extents: list[Extent] = []
    column: dict[int, int] = {}  # number of a storage → its column below
    for number, (operation, position, num_bytes) in enumerate(lives.born):
        value = trace.inputs[position] if operation < 0 else operations[operation].outputs[position]
        if value is None or not trace.tensors[value].derived or num_bytes == 0:
            continue
        elements = sizes.elements(value)
        present = elements.factor * math.prod(len(vector) for vector in elements.vectors)
        column[number] = len(extents)
        extents.append(Extent(elements.factor * num_bytes / (batch * present), elements.vectors))

    # One row per operator, one column per storage: 1 where the storage is alive while the operator runs.
    alive = np.zeros((len(lives.alive), len(extents)), dtype=np.float32)
    for moment, numbers in enumerate(lives.alive):
        columns = [column[number] for number in numbers if number in column]
        alive[moment, columns] = 1
    return extents, _maximal(alive)


def _maximal(alive: np.ndarray) -> np.ndarray:
    """Return the rows (sets, as 0 and 1) that are not subsets of another row."""
    alive = np.unique(alive, axis=0)
    common = alive @ alive.T  # (i, j): number of members shared by sets i and j
    size = alive.sum(axis=1)
    within = (common == size[:, None]) & ~np.eye(len(alive), dtype=bool)
    largest: np.ndarray = alive[~within.any(axis=1)].astype(bool)
    return largest


# -- operators ---------------------------------------------------------------------------------------------


def _kernels(trace: Trace, labeller: Labeller, sizes: _Sizes) -> list[tuple[int, Kernel]]:
    """Return (number of the operator, kernel) for the layers that can be measured in isolation."""
    found = []
    seen: dict[str, int] = {}
    for use in labeller.layers:
        operation = trace.operations[use.operation]
        number = seen[use.module] = seen.get(use.module, -1) + 1
        name = f"{use.module}:{number}"
        if use.weight is None:
            continue
        if operation_name(operation.func) == "convolution":
            kernel = _convolution(trace, operation, use, name, sizes)
        elif operation_name(operation.func) in ("mm", "addmm"):
            kernel = _linear(trace, operation, name, sizes)
        else:
            kernel = None
        if kernel is not None:
            found.append((operation.index, kernel))
    return found


def _convolution(
    trace: Trace, operation: Operation, use: LayerUse, name: str, sizes: _Sizes
) -> Kernel | None:
    named = arguments(operation)
    groups = named["groups"]
    transposed = bool(named["transposed"])
    if transposed and groups > 1:
        return None
    x, weight = (trace.tensors[named[key].value].shape for key in ("input", "weight"))
    geometry = {
        "kind": "convolution",
        "input": list(x[1:]),
        "weight": list(weight),
        "bias": named["bias"] is not None,
        "groups": groups,
        "transposed": transposed,
        **{key: list(named[key]) for key in ("stride", "padding", "dilation", "output_padding")},
    }
    vectors = [np.broadcast_to(sizes.units(axis).reshape(-1), axis.shape) for axis in use.axes]
    taken = vectors[1] if len(vectors) > 1 else np.zeros(0, dtype=np.int64)
    return Kernel(name, vectors[0], taken, geometry, x[0] / sizes.batch)


def _linear(trace: Trace, operation: Operation, name: str, sizes: _Sizes) -> Kernel | None:
    added = operation_name(operation.func) == "addmm"
    left = operation.args[int(added)]
    if not isinstance(left, Ref) or not trace.tensors[left.value].derived or operation.outputs[0] is None:
        return None
    rows, taken = trace.tensors[left.value].shape
    given = trace.tensors[operation.outputs[0]].shape[1]
    geometry = {"kind": "linear", "input": [taken], "weight": [given, taken], "bias": added}
    out_units, in_units = sizes.along(operation.outputs[0], 1), sizes.along(left.value, 1)
    return Kernel(name, out_units, in_units, geometry, rows / sizes.batch)


def _traffic(trace: Trace, sizes: _Sizes, contracted: set[int]) -> list[Extent]:
    extents = []
    for operation in trace.operations:
        if operation.index in contracted or _is_view(operation):
            continue
        leaves = tree_leaves((operation.args, operation.kwargs))
        touched = [leaf.value for leaf in leaves if isinstance(leaf, Ref)]
        touched += [number for number in operation.outputs if number is not None]
        extents += [sizes.elements(number) for number in touched if trace.tensors[number].derived]
    return extents


def _is_view(operation: Operation) -> bool:
    returns = operation.func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
