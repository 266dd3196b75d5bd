"""Channel labels: which atoms the elements of a tensor carry, and which atoms can only go together.

An *atom* is one position along one dimension of one parameter (row 3 of a convolution's weight, say). Every
element of an activation carries the atoms that it vanishes with: channel 3 of a convolution's output carries
row 3 of its weight. Labels are nearly always constant over batch and space, so a tensor's labels are a few
integer arrays (*slots*) of the tensor's rank whose extent is 1 along every dimension that they don't depend
on. No two slots of a tensor vary along the same dimension.

Operators move labels about (`operators/`); wherever two labels meet on one element, their atoms must stay or
go together. What is united that way is found by connected components.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

Slot = np.ndarray
_DEDUPLICATE_FROM = 4096


class AtomTable:
    """Issues atoms, and collects which atoms must be removed together (`unite`) and which must stay (`freeze`)."""

    def __init__(self) -> None:
        self.num_atoms = 0
        self.num_pairs = 0  # united so far
        self.freezes: list[tuple[np.ndarray, str]] = []
        self._left: list[np.ndarray] = []
        self._right: list[np.ndarray] = []

    def copy(self) -> AtomTable:
        """Return a copy of the atoms with all that was recorded about them."""
        other = AtomTable()
        other.num_atoms = self.num_atoms
        other.num_pairs = self.num_pairs
        other.freezes = list(self.freezes)
        other._left = list(self._left)
        other._right = list(self._right)
        return other

    def new(self, count: int) -> np.ndarray:
        """Return `count` new atoms, as a vector."""
        atoms = np.arange(self.num_atoms, self.num_atoms + count, dtype=np.int64)
        self.num_atoms += count
        return atoms

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        """Record that these atoms (negative entries aside) can never be removed, and why."""
        atoms = np.unique(atoms)
        atoms = atoms[atoms >= 0]
        if atoms.size:
            self.freezes.append((atoms, reason))

    def unite(self, left: np.ndarray, right: np.ndarray, reason: str) -> None:
        """Couple the labels of two arrays element by element, after broadcasting.

        A negative entry is an element that cannot be removed, so its partner is frozen, with `reason`.
        """
        if left is right:
            return
        left, right = np.broadcast_arrays(left, right)
        left, right = left.reshape(-1), right.reshape(-1)
        # Pairs of an atom and a fixed element freeze the atom; pairs of two fixed elements say nothing.
        if left.size and min(left.min(), right.min()) < 0:
            self.freeze(np.maximum(left, right)[(left < 0) != (right < 0)], reason)
            both = (left >= 0) & (right >= 0)
            left, right = left[both], right[both]
        different = left != right
        left, right = left[different], right[different]
        # Labels repeat over many elements: each pair is kept once, as the number left · num_atoms + right.
        if left.size > _DEDUPLICATE_FROM:
            pairs = np.unique(left * self.num_atoms + right)
            left, right = np.divmod(pairs, self.num_atoms)
        if left.size:
            self._left.append(left)
            self._right.append(right)
            self.num_pairs += left.size

    def unite_along(self, slot: Slot, axes: tuple[int, ...]) -> Slot:
        """Couple all labels of a slot along `axes`; returns the slot reduced to extent 1 there."""
        axes = tuple(axis for axis in axes if slot.shape[axis] > 1)
        if not axes:
            return slot
        first = slot.max(axis=axes, keepdims=True)
        self.unite(slot, first, "tied to a channel that cannot be removed")
        return np.where((slot < 0).any(axis=axes, keepdims=True), -1, first)

    def unions_within(self, labels: np.ndarray) -> list[int]:
        """Find the pair by which all atoms of some label first came together, and that by which the first two did.

        Args:
            labels: (num_atoms,) label of every atom of one component; negative for all other atoms.

        Returns:
            Numbers of these pairs, in the order in which atoms were united; nothing if all labels stay apart.
        """
        left = np.concatenate([np.zeros(0, dtype=np.int64), *self._left])
        right = np.concatenate([np.zeros(0, dtype=np.int64), *self._right])
        root: dict[int, int] = {}
        held = {atom: {label} for atom, label in enumerate(labels.tolist()) if label >= 0}
        apart = Counter(labels[labels >= 0].tolist())  # label → in how many parts its atoms are still
        first: list[int] = []

        def find(atom: int) -> int:
            while (above := root.get(atom, atom)) != atom:
                root[atom] = root.get(above, above)
                atom = above
            return atom

        within = np.isin(left, np.fromiter(held, dtype=np.int64))
        for number in np.flatnonzero(within).tolist():
            one, two = find(int(left[number])), find(int(right[number]))
            if one == two:
                continue
            others = held.pop(two, set())
            for label in held[one] & others:
                first = first or [number]
                apart[label] -= 1
                if apart[label] == 1:
                    return [number, *first]
            root[two] = one
            held[one] |= others
        return first

    def frozen(self, root: np.ndarray) -> np.ndarray:
        """Whether the component that an atom names can never be removed, as a vector over all atoms."""
        found = np.zeros(root.size, dtype=bool)
        for atoms, _ in self.freezes:
            found[root[atoms]] = True
        return found

    def components(self) -> np.ndarray:
        """Return the smallest atom of each atom's component, as a vector over all atoms."""
        root = np.arange(self.num_atoms, dtype=np.int64)
        if not self._left:
            return root
        left = np.concatenate(self._left)
        right = np.concatenate(self._right)
        self._left, self._right = [left], [right]
        while left.size:
            # Pairs that still lie in two components: the larger root is hung below the smaller one.
            a, b = root[left], root[right]
            apart = a != b
            left, right = left[apart], right[apart]
            a, b = a[apart], b[apart]
            np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
            # Follow the roots until every atom points at a root that points at itself.
            while True:
                jumped = root[root]
                if np.array_equal(jumped, root):
                    break
                root = jumped
        return root


@dataclasses.dataclass(frozen=True)
class Value:
    """Labels of one tensor.

    Attributes:
        shape: The tensor's shape.
        slots: Label arrays of the tensor's rank, extent 1 where they do not vary; disjoint supports.
        free: Dimensions along which the tensor repeats one value, so that any extent is valid.
    """

    shape: tuple[int, ...]
    slots: tuple[Slot, ...] = ()
    free: frozenset[int] = frozenset()

    def slot_at(self, dim: int) -> Slot | None:
        """Return the slot that varies along `dim`; None if there is none."""
        for slot in self.slots:
            if slot.shape[dim] > 1:
                return slot
        return None

    def is_solid(self, dim: int) -> bool:
        """Whether the tensor's extent along `dim` matters: it is more than 1 and not a mere repetition."""
        return self.shape[dim] > 1 and dim not in self.free


def support(slot: Slot) -> tuple[int, ...]:
    """Return the dimensions that a slot varies along."""
    return tuple(dim for dim, extent in enumerate(slot.shape) if extent > 1)


def compress(slot: Slot) -> Slot:
    """Reduce to extent 1 every dimension along which the labels do not change."""
    for dim in support(slot):
        first = slot.take([0], axis=dim)
        if (slot == first).all():
            slot = first
    return slot


def join_slots(table: AtomTable, first: Slot, second: Slot) -> Slot:
    """Couple two slots that vary along a common dimension and return one that replaces both.

    If both vary along the same dimensions, the older atoms are used, so that everything coupled with the same channels
    has the same labels.
    """
    table.unite(first, second, "combined with channels that cannot be removed")
    one, two = set(support(first)), set(support(second))
    if one == two and min(first.min(), second.min()) >= 0:
        older: Slot = np.minimum(first, second)
        return older
    if one <= two and first.min() >= 0:
        return first
    if two <= one and second.min() >= 0:
        return second
    return np.where((first < 0) | (second < 0), -1, first)


def make_value(
    table: AtomTable,
    shape: tuple[int, ...],
    slots: list[Slot],
    free: frozenset[int] = frozenset(),
    where: str = "",
) -> Value:
    """Make a `Value` that keeps the invariants: disjoint supports, no slot without labels or without extent.

    A label that covers a whole tensor (a single selected channel) cannot be removed: it is frozen.
    """
    kept: list[Slot] = []
    for slot in slots:
        if slot.max(initial=-1) < 0:
            continue
        if slot.size == 1:
            table.freeze(slot, f"the only channel of a tensor {where}")
            continue
        dims = set(support(slot))
        while True:
            meeting = next((i for i, other in enumerate(kept) if dims & set(support(other))), None)
            if meeting is None:
                break
            slot = join_slots(table, kept.pop(meeting), slot)
            dims = set(support(slot))
        if dims:
            kept.append(slot)
    return Value(shape, tuple(kept), free)


def reshape_slot(slot: Slot, old: tuple[int, ...], new: tuple[int, ...]) -> Slot:
    """Return the labels of `tensor.reshape(new)`, given those of a tensor of shape `old`.

    Only the dimensions that take part in a change and carry labels are written out in full.
    """
    spread, target = [], []
    for old_dims, new_dims in matching_dims(old, new):
        varies = any(slot.shape[dim] > 1 for dim in old_dims)
        spread += [old[dim] if varies else 1 for dim in old_dims]
        target += [new[dim] if varies else 1 for dim in new_dims]
    return compress(np.broadcast_to(slot, spread).reshape(target))


def matching_dims(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into the shortest runs of dimensions with equal products, in order."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        run: tuple[list[int], list[int]] = ([], [])
        left = right = 1
        if i < len(old):
            run[0].append(i)
            left, i = old[i], i + 1
        if j < len(new):
            run[1].append(j)
            right, j = new[j], j + 1
        while left != right:
            if left < right or right == 0:
                run[0].append(i)
                left, i = left * old[i], i + 1
            else:
                run[1].append(j)
                right, j = right * new[j], j + 1
        runs.append(run)
    return runs
