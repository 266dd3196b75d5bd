"""Coupled channel groups: which slices of which tensors leave together.

The atoms that label propagation has united form *units*: removing unit u means removing every slice that
carries it. Units that touch the same dimensions of the same tensors form a *group*; within a group every unit
can go on its own, so a group of width w has w − 1 smaller versions and no further constraint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pruning.labelling import Choice, Labeller, LayerUse, SizeUse
from pruning.labels import Slot, compress, support

FROZEN = -1


@dataclasses.dataclass
class Axis:
    """One dimension of a parameter or buffer.

    Attributes:
        tensor: Its first qualified name.
        aliases: All its names (shared tensors have several).
        dim: The dimension.
        units: Unit of every slice; -1 where a slice always stays.
        role: "out" (a layer's own channels), "in" (the channels it reads) or "along" (vectors that follow).
    """

    tensor: str
    aliases: tuple[str, ...]
    dim: int
    units: np.ndarray
    role: str = "along"


@dataclasses.dataclass
class AttributeAxis:
    """A whole number held by a module that counts channels: it always equals `len(units)`.

    `item` is the position within a list or tuple; None for a plain integer. `found` says that it was found by
    trial rather than known.
    """

    module: str
    attribute: str
    item: int | None
    units: np.ndarray
    found: bool = False


@dataclasses.dataclass
class Place:
    """A tensor that goes into or comes out of a module and carries units.

    Attributes:
        module: Qualified name.
        kind: "input" (the first argument) or "output".
        call: Which call of the module within a forward pass (modules may be used several times).
        dim: Dimension of the tensor that the units lie along.
        units: Unit of every position along `dim`, -1 for those that always stay.
        shape: The tensor's shape as traced, first dimension included.
        consumer: The module contracts this dimension: what it reads is the last that is seen of the units.
        is_leaf: The module has no submodules.
    """

    module: str
    kind: str
    call: int
    dim: int
    units: np.ndarray
    shape: tuple[int, ...]
    consumer: bool
    is_leaf: bool


@dataclasses.dataclass
class Layer:
    """A contraction and its cost: MACs per image = `constant` × Π number of kept positions of each axis."""

    module: str
    operator: str
    constant: float
    axes: tuple[np.ndarray, ...]
    produced: np.ndarray | None
    consumed: np.ndarray | None
    weight: str | None
    spatial: float
    training_only: bool = False

    @property
    def macs(self) -> float:
        """Multiply-accumulates per image at the present widths."""
        return self.constant * float(np.prod([float(axis.size) for axis in self.axes]))


@dataclasses.dataclass(frozen=True)
class Member:
    """One dimension of one tensor that loses slices when units of a group go.

    `positions` holds, for every slice, the group's unit (0 … width−1) that it belongs to, or -1.
    """

    tensor: str
    aliases: tuple[str, ...]
    dim: int
    role: str
    positions: np.ndarray


@dataclasses.dataclass(eq=False)  # a group is itself: it serves as a key
class Group:
    """Coupled channels.

    Attributes:
        index: Position in `ChannelGraph.groups`; keeps its meaning through rewrites.
        name: Qualified name of the layer that produces the channels first (a suffix `#2` tells groups of
            the same layer apart).
        units: Ids of its units, in the order of the first member's slices.
        prunable: Whether units may be removed.
        reason: Why not, for people; empty if prunable.
        notes: What a user should know (statistics of a LayerNorm change, an integer attribute follows).
        kinds: Types of the modules it touches.
        channels_per_unit: Channels of the producing layer that a unit holds (more than 1 for grouped layers).
        original_width: Width when the graph was made.
    """

    index: int
    name: str
    units: np.ndarray
    prunable: bool
    reason: str
    notes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    channels_per_unit: int = 1
    original_width: int = 0

    @property
    def width(self) -> int:
        """Number of units."""
        return len(self.units)


@dataclasses.dataclass
class Coupling:
    """Units and groups, before `building.py` makes a `ChannelGraph` of them.

    Attributes:
        unit_of_atom: Unit id of every atom, -1 for atoms that belong to no group.
        groups: Producing layer, unit ids in the order of its slices, and why they are frozen ("" if not).
    """

    unit_of_atom: np.ndarray
    groups: list[tuple[str, np.ndarray, str]]


def settle(labeller: Labeller) -> np.ndarray:
    """Components of atoms after every tensor has been made to stay rectangular.

    A dimension that was split in two, (C) → (g, C/g), must lose whole rows or whole columns. Where the
    labels still depend on both, those of the shorter dimension are united (or as the policy says).
    """
    waiting = _distinct(labeller.joint_slots)
    root = labeller.table.components()
    while waiting:
        left, changed = [], False
        for slot, key in waiting:
            labels = compress(np.where(slot < 0, -1, root[slot]))
            dims = support(labels)
            if len(dims) < 2:
                continue
            longest = max(dims, key=lambda dim: labels.shape[dim])
            keep = int(labeller.policy.get(key, longest))
            labeller.choices[key] = Choice(str(keep), labels, "")
            labeller.table.unite_along(labels, tuple(dim for dim in dims if dim != keep))
            left.append((slot, key))
            changed = True
        root = labeller.table.components() if changed else root
        waiting = left
    return root


def _distinct(slots: list[tuple[Slot, str]]) -> list[tuple[Slot, str]]:
    seen: dict[int, tuple[Slot, str]] = {}
    for slot, key in slots:
        seen.setdefault(id(slot), (slot, key))
    return list(seen.values())


def couple(labeller: Labeller) -> Coupling:
    """Number the units of everything that was labelled and sort them into groups.

    Components belong together if they lie on the same dimensions of the same tensors, are counted by the same
    whole numbers, and share their fate. Components that no layer produces belong to no group.
    """
    root = settle(labeller)
    reasons = _reasons(labeller, root)
    producers = [use for use in labeller.layers if use.produced is not None and use.weight is not None]
    produced = _first_producers(producers, root)
    kinds = _signatures(labeller, root)
    members = np.flatnonzero((kinds != 0) & (produced >= 0) & (root == np.arange(root.size)))
    fates = [reasons.get(component, "") for component in members.tolist()]
    number_of = {reason: number for number, reason in enumerate(["", *dict.fromkeys(fates)])}
    number_of[""] = 0
    fate_numbers = np.array([number_of[reason] for reason in fates], dtype=np.int64)
    own = np.where(fate_numbers > 0, produced[members], -1)  # frozen ones are listed by layer
    keys = np.stack([kinds[members].view(np.int64), fate_numbers, own], axis=1)
    _, group_of = np.unique(keys, axis=0, return_inverse=True)
    order = np.lexsort((members, produced[members]))
    unit_of_component = np.full(root.size, FROZEN, dtype=np.int64)
    groups: list[tuple[str, np.ndarray, str]] = []
    count = 0
    for number in dict.fromkeys(group_of.reshape(-1)[order].tolist()):
        chosen = members[group_of.reshape(-1) == number]
        layer = producers[produced[chosen[0]]]
        chosen = _in_slice_order(layer, root, chosen)
        units = np.arange(count, count + chosen.size)
        unit_of_component[chosen] = units
        count += chosen.size
        groups.append((layer.module or str(layer.weight), units, reasons.get(int(chosen[0]), "")))
    return Coupling(unit_of_component[root], groups)


def _reasons(labeller: Labeller, root: np.ndarray) -> dict[int, str]:
    """Why components are frozen: the first reason that was met."""
    found: dict[int, str] = {}
    for atoms, reason in labeller.table.freezes:
        for component in np.unique(root[atoms]).tolist():
            found.setdefault(component, reason)
    return found


def _first_producers(producers: list[LayerUse], root: np.ndarray) -> np.ndarray:
    """Number of the first layer, in order of execution, whose output carries a component; -1 if none does."""
    produced = np.full(root.size, -1, dtype=np.int64)
    for number in reversed(range(len(producers))):
        atoms = producers[number].produced
        assert atoms is not None
        produced[root[atoms[atoms >= 0]]] = number
    return produced


def _signatures(labeller: Labeller, root: np.ndarray) -> np.ndarray:
    """A 64-bit number per component: the sum of random numbers of all axes and counts that it takes part in."""
    generator = np.random.Generator(np.random.Philox(0))
    signatures = np.zeros(root.size, dtype=np.uint64)
    vectors = list(labeller.parameter_atoms.values())
    counted: dict[int, np.ndarray] = {id(use.atoms): use.atoms for use in labeller.size_uses}
    for atoms in (*vectors, *counted.values()):
        atoms = atoms.reshape(-1)
        components = np.unique(root[atoms[atoms >= 0]])
        signatures[components] += generator.integers(1, 1 << 63, dtype=np.uint64)
    return signatures


def _in_slice_order(layer: LayerUse, root: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Components in the order in which the producing layer's output carries them."""
    assert layer.produced is not None
    labels = root[layer.produced[layer.produced >= 0]]
    labels = labels[np.isin(labels, components)]
    unique, first = np.unique(labels, return_index=True)
    return unique[np.argsort(first)] if unique.size == components.size else np.sort(components)


def as_units(unit_of_atom: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Atoms (any shape, negative = always stays) to unit ids."""
    return np.where(atoms < 0, FROZEN, unit_of_atom[np.maximum(atoms, 0)])


def vector_of(unit_of_atom: np.ndarray, use: SizeUse) -> np.ndarray | None:
    """Units counted by a size use; None where the count is not one along a single dimension."""
    if use.atoms.shape[use.dim] == 0:
        return np.zeros(0, dtype=np.int64)
    units = as_units(unit_of_atom, use.atoms)
    extent = units.shape[use.dim]
    first = np.moveaxis(units, use.dim, 0).reshape(extent, -1)
    columns_equal = (first == first[:, :1]).all()
    return first[:, 0] if columns_equal else None


def as_layer(unit_of_atom: np.ndarray, use: LayerUse, batch: int) -> Layer:
    """A layer's cost in units, per image."""

    def convert(atoms: np.ndarray | None) -> np.ndarray | None:
        return None if atoms is None else as_units(unit_of_atom, atoms)

    batch = batch if use.per_image else 1
    axes: Sequence[np.ndarray] = [as_units(unit_of_atom, axis) for axis in use.axes]
    return Layer(
        use.module, use.operator, use.constant / batch, tuple(axes), convert(use.produced),
        convert(use.consumed), use.weight, use.spatial / batch,
    )  # fmt: skip
