"""Turns united labels into coupled units, and units into groups."""

from __future__ import annotations

import dataclasses

import numpy as np

from pruning.engine.groups import FROZEN, Layer
from pruning.engine.labeller import Choice, Labeller, LayerUse, SizeUse
from pruning.engine.labels import Slot, compress, support


@dataclasses.dataclass
class Coupling:
    """Units and groups, from which `building.py` makes a `ChannelGraph`.

    Attributes:
        unit_of_atom: Unit id of every atom, -1 for atoms that belong to no group.
        groups: Producing layer, unit ids in the order of its slices, and why they are frozen ("" if not).
    """

    unit_of_atom: np.ndarray
    groups: list[tuple[str, np.ndarray, str]]


def settle(labeller: Labeller) -> np.ndarray:
    """Compute the components of atoms such that every tensor stays rectangular.

    A dimension that was split in two, (C) → (g, C/g), must lose whole rows or whole columns. Where the labels still
    depend on both, those of the shorter dimension are united (or as the policy says).

    Returns:
        (atoms,) the smallest atom of each atom's component.
    """
    waiting = _distinct(labeller.joint_slots)
    root = labeller.table.components()
    frozen = np.zeros(root.size, dtype=bool)
    while waiting:
        still_waiting = []
        for slot, key in waiting:
            # Atoms that were united since give the slot equal labels: it may no longer depend on two dimensions.
            labels = compress(np.where((slot < 0) | frozen[root[slot]], FROZEN, root[slot]))
            dims = support(labels)
            if len(dims) < 2:
                continue
            longest = max(dims, key=lambda dim: labels.shape[dim])
            keep = int(labeller.policy.get(key, longest))
            labeller.choices[key] = Choice(str(keep), labels, "")
            labeller.table.unite_along(labels, tuple(dim for dim in dims if dim != keep))
            still_waiting.append((slot, key))
        # What was united for one tensor can leave another one uneven, so all that had two dimensions are seen again.
        # Atoms beside one that always stays are frozen by then, and count as staying too: else there is no end.
        if still_waiting:
            root = labeller.table.components()
            frozen = labeller.table.frozen(root)
        waiting = still_waiting
    return root


def _distinct(slots: list[tuple[Slot, str]]) -> list[tuple[Slot, str]]:
    """Return each array once, with the key of the operator that produced it first."""
    seen: dict[int, tuple[Slot, str]] = {}
    for slot, key in slots:
        seen.setdefault(id(slot), (slot, key))
    return list(seen.values())


def couple(labeller: Labeller) -> Coupling:
    """Number the units of everything that was labelled and sort them into groups.

    Components belong together if they lie on the same dimensions of the same tensors, are counted by the same
    whole numbers, and share their fate. Components that no layer produces belong to no group.
    """
    # root: (atoms,) the component of every atom, named by its smallest atom.
    # produced: (atoms,) number of the first layer that gives a component; kinds: (atoms,) what it takes part in.
    root = settle(labeller)
    reasons = _reasons(labeller, root)
    producers = [use for use in labeller.layers if use.produced is not None and use.weight is not None]
    produced = _first_producers(producers, root)
    kinds = _signatures(labeller, root)

    # members: the components that become units. group_of: (members,) which belong together.
    is_component = root == np.arange(root.size)
    members = np.flatnonzero(is_component & (kinds != 0) & (produced >= 0))
    group_of = _partition(kinds[members], produced[members], [reasons.get(m, "") for m in members.tolist()])

    # Groups are listed in the order in which layers first produce them, and numbered through unit by unit.
    unit_of_component = np.full(root.size, FROZEN, dtype=np.int64)
    groups: list[tuple[str, np.ndarray, str]] = []
    num_units = 0
    in_order = np.lexsort((members, produced[members]))
    for number in dict.fromkeys(group_of[in_order].tolist()):
        components = members[group_of == number]
        layer = producers[produced[components[0]]]
        reason = reasons.get(int(components[0]), "")
        components = _in_slice_order(layer, root, components)
        units = np.arange(num_units, num_units + components.size)
        unit_of_component[components] = units
        num_units += components.size
        groups.append((layer.module or str(layer.weight), units, reason))
    return Coupling(unit_of_component[root], groups)


def _partition(kinds: np.ndarray, produced: np.ndarray, fates: list[str]) -> np.ndarray:
    """Return the number of each component's group.

    Args:
        kinds: (components,) signature of the axes and counts that each takes part in (see `_signatures`).
        produced: (components,) number of the first layer that produces each.
        fates: Why each is frozen, "" if it is not.
    """
    numbers = {"": 0}
    for fate in fates:
        numbers.setdefault(fate, len(numbers))
    fate_numbers = np.array([numbers[fate] for fate in fates], dtype=np.int64)
    # Frozen components are told apart by their layers too, so that a report can list them layer by layer.
    own_layer = np.where(fate_numbers > 0, produced, -1)
    keys = np.stack([kinds.view(np.int64), fate_numbers, own_layer], axis=1)
    _, group_of = np.unique(keys, axis=0, return_inverse=True)
    return group_of.reshape(-1)


def _reasons(labeller: Labeller, root: np.ndarray) -> dict[int, str]:
    """Return why components are frozen: the first reason recorded for each."""
    freezes = labeller.table.freezes
    first = np.full(root.size, -1, dtype=np.int64)
    for number in reversed(range(len(freezes))):
        first[root[freezes[number][0]]] = number
    frozen = np.flatnonzero(first >= 0)
    return {
        component: freezes[number][1]
        for component, number in zip(frozen.tolist(), first[frozen].tolist(), strict=True)
    }


def _first_producers(producers: list[LayerUse], root: np.ndarray) -> np.ndarray:
    """Return the number of the first executed layer whose output carries each component; -1 if none does."""
    produced = np.full(root.size, -1, dtype=np.int64)
    for number in reversed(range(len(producers))):
        atoms = producers[number].produced
        assert atoms is not None
        produced[root[atoms[atoms >= 0]]] = number
    return produced


def _signatures(labeller: Labeller, root: np.ndarray) -> np.ndarray:
    """Return a 64-bit number per component: the sum of random numbers of all axes and counts that it takes part in."""
    generator = np.random.Generator(np.random.Philox(0))
    signatures = np.zeros(root.size, dtype=np.uint64)
    vectors = list(labeller.parameter_atoms.values())
    counted: dict[int, np.ndarray] = {id(use.atoms): use.atoms for use in labeller.size_uses}
    for atoms in (*vectors, *counted.values()):
        atoms = atoms.reshape(-1)
        # Once per component, however often it occurs: NumPy writes one sum for all occurrences.
        signatures[root[atoms[atoms >= 0]]] += generator.integers(1, 1 << 63, dtype=np.uint64)
    return signatures


def _in_slice_order(layer: LayerUse, root: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Return the components in the order in which the producing layer's output carries them."""
    assert layer.produced is not None
    labels = root[layer.produced[layer.produced >= 0]]
    labels = labels[np.isin(labels, components)]
    unique, first = np.unique(labels, return_index=True)
    return unique[np.argsort(first)] if unique.size == components.size else np.sort(components)


def as_units(unit_of_atom: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Convert atoms (any shape, negative = always stays) to unit ids."""
    return np.where(atoms < 0, FROZEN, unit_of_atom[np.maximum(atoms, 0)])


def vector_of(unit_of_atom: np.ndarray, use: SizeUse) -> np.ndarray | None:
    """(extent,) units along the dimension that a size use counts; None where they differ along other dimensions."""
    if use.atoms.shape[use.dim] == 0:
        return np.zeros(0, dtype=np.int64)
    units = as_units(unit_of_atom, use.atoms)
    rows = np.moveaxis(units, use.dim, 0).reshape(units.shape[use.dim], -1)
    all_alike = (rows == rows[:, :1]).all()
    return rows[:, 0] if all_alike else None


def literal_around(labeller: Labeller, unit_of_atom: np.ndarray, units: np.ndarray) -> SizeUse | None:
    """Return the first operator that counts some of these units by a number that is written in the code.

    Args:
        labeller: The labels, with all numbers that count them.
        unit_of_atom: Unit of every atom.
        units: The units.
    """
    for use in labeller.size_uses:
        if use.written and np.isin(as_units(unit_of_atom, use.atoms), units).any():
            return use
    return None


def as_layer(unit_of_atom: np.ndarray, use: LayerUse, batch: int) -> Layer:
    """Return a layer's cost in units, per image."""

    def convert(atoms: np.ndarray | None) -> np.ndarray | None:
        return None if atoms is None else as_units(unit_of_atom, atoms)

    batch = batch if use.per_image else 1
    return Layer(
        module=use.module,
        operator=use.operator,
        constant=use.constant / batch,
        axes=tuple(as_units(unit_of_atom, axis) for axis in use.axes),
        produced=convert(use.produced),
        consumed=convert(use.consumed),
        weight=use.weight,
        spatial=use.spatial / batch,
    )
