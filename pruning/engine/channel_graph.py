"""The channel graph as data: groups, the tensors that carry their units, and its update after a rewrite.

`trace_groups` makes it from a network; `surgery.py` cuts by it; criteria and cost models read it.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pruning.engine.constraints import UNCONSTRAINED, Constraints
from pruning.engine.examples import Pass
from pruning.engine.graph_state import PARTS, as_arrays, differ, plain, row_of
from pruning.engine.group_rows import group_row, groups_html
from pruning.engine.groups import FROZEN, AttributeAxis, Axis, Group, Layer, Member, Place
from pruning.engine.kept_statistics import Statistics

GroupKey = Group | str | int
Keep = Mapping[Any, Sequence[int] | Tensor | np.ndarray]


class ChannelGraph:
    """Groups of coupled channels with everything that carries their units.

    Attributes:
        groups: All groups, prunable or not, in order of execution.
        axes: Every dimension of every tensor that carries units.
        attributes: Whole numbers held by modules that count units.
        places: Inputs and outputs of modules that carry units.
        layers: Contractions with their costs.
        constraints: The user's demands.
        statistics: Normalisations whose statistics run over units.
        choices: The choices made where an operator could couple in several ways.
        ungated: Units that some operator outside any layer reads, so that gates at layers' inputs miss that read.
        unit_of_atom: Unit of every atom of the label propagation (before any rewrite).
        passes: The ways in which the network is run when a cut is tried before it is made; a graph from a checkpoint
            has none until `give_examples` gives it some.
        untouched: Names of the parameters that no pass has touched, and of other tensors as wide as what may shrink.
        num_units: Number of unit ids.
    """

    def __init__(
        self,
        groups: list[Group],
        axes: list[Axis],
        attributes: list[AttributeAxis],
        places: list[Place],
        layers: list[Layer],
        constraints: Constraints,
        statistics: list[Statistics],
        unit_of_atom: np.ndarray,
        choices: Mapping[str, str],
        ungated: np.ndarray,
    ) -> None:
        self.groups = groups
        self.axes = axes
        self.attributes = attributes
        self.places = places
        self.layers = layers
        self.constraints = constraints
        self.statistics = statistics
        self.unit_of_atom = unit_of_atom
        self.choices = dict(choices)
        self.ungated = ungated
        self.passes: tuple[Pass, ...] = ()
        self.untouched: tuple[str, ...] = ()
        self._index()

    def _index(self) -> None:
        self.num_units = sum(group.width for group in self.groups)
        self.group_of_unit = np.empty(self.num_units, dtype=np.int64)
        self.position_of_unit = np.empty(self.num_units, dtype=np.int64)
        for group in self.groups:
            self.group_of_unit[group.units] = group.index
            self.position_of_unit[group.units] = np.arange(group.width)
        self._touching: dict[str, dict[int, list[int]]] = {}
        units_of = {"axes": [a.units for a in self.axes], "places": [p.units for p in self.places]}
        for kind, carriers in units_of.items():
            table: dict[int, list[int]] = {}
            for number, units in enumerate(carriers):
                for index in self.groups_in(units):
                    table.setdefault(index, []).append(number)
            self._touching[kind] = table

    def _repr_html_(self) -> str:
        """The HTML view in a notebook: a table of the groups."""
        return groups_html(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Return every group as plain data: name, widths, modules, tensors, and why it cannot be pruned."""
        return [group_row(group, self.allowed_widths(group)[0], self.members(group)) for group in self.groups]

    def groups_in(self, units: np.ndarray) -> list[int]:
        """Return the indices of the groups that contain any of these unit ids."""
        if not units.size:
            return []
        occurs = np.zeros(len(self.groups), dtype=bool)
        occurs[self.group_of_unit[units[units >= 0]]] = True
        return np.flatnonzero(occurs).tolist()  # sorted, and much faster than `np.unique` of a few numbers

    # -- looking at groups ---------------------------------------------------------------------------------

    @property
    def prunable(self) -> list[Group]:
        """The groups that may lose units."""
        return [group for group in self.groups if group.prunable]

    @property
    def frozen(self) -> dict[str, str]:
        """Group name to the reason why the group cannot be pruned."""
        return {group.name: group.reason for group in self.groups if not group.prunable}

    def group(self, key: GroupKey) -> Group:
        """Look up a group by itself, its index, or its name.

        Raises:
            ValueError: There is no such group.
        """
        if isinstance(key, Group):
            key = key.index
        if isinstance(key, (int, np.integer)):
            if 0 <= key < len(self.groups):
                return self.groups[int(key)]
        else:
            for group in self.groups:
                if group.name == key:
                    return group
            for group in self.groups:
                if any(member.tensor.rpartition(".")[0] == key for member in self.members(group)):
                    return group
        raise ValueError(f"no channel group {key!r}: `python -m pruning groups` lists them")

    def members(self, group: GroupKey) -> list[Member]:
        """Return the dimensions of tensors that lose slices with this group."""
        index = self.group(group).index
        found = []
        for number in self._touching["axes"].get(index, []):
            axis = self.axes[number]
            found.append(
                Member(axis.tensor, axis.aliases, axis.dim, axis.role, self.local(index, axis.units))
            )
        return found

    def places_of(
        self, group: GroupKey, kind: str | None = None, consumer: bool | None = None
    ) -> list[Place]:
        """Return the module inputs and outputs that carry this group's units, in order of execution.

        Args:
            group: The group.
            kind: Only "input" or "output" places.
            consumer: Only those whose module contracts the units (True) or does not (False).
        """
        places = [self.places[number] for number in self._touching["places"].get(self.group(group).index, [])]
        places = [place for place in places if kind is None or place.kind == kind]
        return [place for place in places if consumer is None or place.consumer == consumer]

    def layers_of(self, group: GroupKey) -> list[Layer]:
        """Return the layers whose cost depends on this group's width."""
        index = self.group(group).index
        return [layer for layer in self.layers if any(index in self.groups_in(axis) for axis in layer.axes)]

    def local(self, group: GroupKey, units: np.ndarray) -> np.ndarray:
        """Map unit ids to positions within one group; -1 for everything else."""
        index = self.group(group).index
        valid = np.maximum(units, 0)
        inside = (units >= 0) & (self.group_of_unit[valid] == index)
        return np.where(inside, self.position_of_unit[valid], FROZEN)

    def min_width_of(self, group: GroupKey) -> int:
        """Return the number of units that must stay under all constraints."""
        group = self.group(group)
        demands = [self.constraints.min_width, *self._limits_of.get(group.index, ())]
        counts = [int(np.ceil(d * group.original_width - 1e-9)) if d < 1 else int(d) for d in demands]
        return min(group.width, max(1, *counts)) if group.prunable else group.width

    def matching(self, pattern: str) -> list[Group]:
        """Return the groups that a pattern matches: by their own name, or by a module that produces their channels."""
        found = []
        for group in self.groups:
            own = [member for member in self.members(group) if member.role != "in"]
            names = {group.name} | {alias.rpartition(".")[0] for member in own for alias in member.aliases}
            if any(fnmatch.fnmatch(name, pattern) for name in names):
                found.append(group)
        return found

    @functools.cached_property
    def _limits_of(self) -> dict[int, list[float]]:
        """Group index → the bounds that `limits` sets for it; rewrites do not change them."""
        found: dict[int, list[float]] = {}
        for pattern, least in self.constraints.limits.items():
            for group in self.matching(pattern):
                found.setdefault(group.index, []).append(least)
        return found

    def allowed_widths(self, group: GroupKey) -> list[int]:
        """Return all widths that the constraints allow, the current one included, ascending."""
        group = self.group(group)
        if not group.prunable:
            return [group.width]
        per_unit = group.channels_per_unit
        lowest = self.min_width_of(group)
        widths = [w for w in range(lowest, group.width) if (w * per_unit) % self.constraints.round_to == 0]
        return [*widths, group.width]

    # -- choosing ------------------------------------------------------------------------------------------

    def keep_mask(self, keep: Keep) -> np.ndarray:
        """Return a boolean vector over unit ids: True for units that stay.

        Args:
            keep: Group (or name, or index) to the positions of the units that stay.

        Raises:
            ValueError: A group is frozen, an index is out of range, or too little would stay.
        """
        mask = np.ones(self.num_units, dtype=bool)
        for key, positions in keep.items():
            group = self.group(key)
            kept = _as_indices(positions, group)
            self._check_choice(group, kept)
            mask[group.units] = False
            mask[group.units[kept]] = True
        for axis in self.axes:
            if axis.units.size and not np.any((axis.units < 0) | mask[np.maximum(axis.units, 0)]):
                raise ValueError(f"nothing would be left of {axis.tensor!r}, dimension {axis.dim}")
        return mask

    def _check_choice(self, group: Group, kept: np.ndarray) -> None:
        if kept.size == group.width and np.array_equal(np.sort(kept), np.arange(group.width)):
            return
        if not group.prunable:
            raise ValueError(f"group {group.name!r} cannot be pruned: {group.reason}")
        if kept.size and (kept.min() < 0 or kept.max() >= group.width or np.unique(kept).size != kept.size):
            raise ValueError(
                f"group {group.name!r}: keep indices must be distinct and within 0…{group.width - 1}"
            )
        if kept.size < self.min_width_of(group):
            raise ValueError(
                f"group {group.name!r}: {kept.size} of {group.width} would stay; at least "
                f"{self.min_width_of(group)} must"
            )

    # -- following a rewrite -------------------------------------------------------------------------------

    def shrink(self, mask: np.ndarray) -> None:
        """Follow a rewrite: drop the units that are False in `mask` and renumber the others."""
        new_id = np.where(mask, np.cumsum(mask) - 1, FROZEN)

        def kept(units: np.ndarray) -> np.ndarray:
            """Return the ids that stay, in their new numbering; positions without a unit (-1) always stay."""
            valid = np.maximum(units, 0)
            stays = (units < 0) | mask[valid]
            renumbered: np.ndarray = np.where(units < 0, FROZEN, new_id[valid])[stays]
            return renumbered

        # Every array of unit ids loses the ids that go, and the others get their new numbers.
        carriers: list[Axis | AttributeAxis | Statistics] = [*self.axes, *self.attributes, *self.statistics]
        for carrier in carriers:
            carrier.units = kept(carrier.units)
        for place in self.places:
            units = kept(place.units)
            place.shape = tuple(len(units) if d == place.dim else s for d, s in enumerate(place.shape))
            place.units = units
        for layer in self.layers:
            layer.axes = tuple(kept(axis) for axis in layer.axes)
            layer.produced = None if layer.produced is None else kept(layer.produced)
            layer.consumed = None if layer.consumed is None else kept(layer.consumed)
        self.ungated = kept(self.ungated[mask[self.ungated]]) if self.ungated.size else self.ungated
        for group in self.groups:
            group.units = kept(group.units)
        self._index()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole graph as lists, strings, numbers and int32 tensors, for a checkpoint.

        A resumed run loads its graph from this state instead of tracing the pruned network again, because a network
        with a single head or group left would look wired differently.
        """
        state: dict[str, Any] = {
            "choices": dict(self.choices),
            "ungated": plain(self.ungated),
            "ignored": list(self.constraints.ignored),
        }
        for name in PARTS:
            state[name] = [row_of(part) for part in getattr(self, name)]
        state["statistics"] = [row_of(use.without_line()) for use in self.statistics]
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], constraints: Constraints | None = None) -> ChannelGraph:
        """Rebuild the graph from the output of `state_dict`.

        Args:
            state: From `state_dict`, directly or from a file.
            constraints: The user's demands (they belong to the run, not to the state).

        Raises:
            ValueError: It is not the state of a channel graph.
        """
        try:
            parts: dict[str, list[Any]] = {}
            for name, kind in PARTS.items():
                rows = [{key: as_arrays(value) for key, value in row.items()} for row in state[name]]
                parts[name] = [kind(**row) for row in rows]
            return cls(
                **parts,
                constraints=constraints or UNCONSTRAINED,
                unit_of_atom=np.zeros(0, dtype=np.int64),
                choices=state["choices"],
                ungated=as_arrays(state["ungated"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"this is not the state of a channel graph: {error!r}") from error

    def signature(self) -> list[tuple[Any, ...]]:
        """Return the groups as comparable data: two graphs of the same network have equal signatures."""
        rows = []
        for group in self.groups:
            members = tuple((m.tensor, m.dim, tuple(m.positions.tolist())) for m in self.members(group))
            rows.append((group.name, group.width, group.prunable, members))
        return rows

    def cuts_like(self, other: ChannelGraph) -> bool:
        """Whether every cut of the same units changes the network alike and is verified at the same places."""
        for name in PARTS:
            mine, its = getattr(self, name), getattr(other, name)
            if len(mine) != len(its) or any(map(differ, mine, its)):
                return False
        return True

    def freeze(self, groups: Iterable[GroupKey], reason: str) -> None:
        """Mark groups as not prunable, with the reason."""
        for key in groups:
            group = self.group(key)
            if group.prunable:
                group.prunable = False
                group.reason = reason

    @property
    def macs(self) -> float:
        """Return the MACs per image of all layers in evaluation mode, at the current widths."""
        return sum(layer.macs for layer in self.layers if not layer.training_only)


def _as_indices(positions: Sequence[int] | Tensor | np.ndarray, group: Group) -> np.ndarray:
    if isinstance(positions, Tensor):
        positions = positions.detach().cpu().numpy()
    array = np.asarray(positions)
    if array.dtype == bool:
        if array.shape != (group.width,):
            raise ValueError(
                f"group {group.name!r}: a mask of shape {array.shape} for {group.width} units; give one value per unit"
            )
        return np.flatnonzero(array)
    return array.astype(np.int64).reshape(-1)
