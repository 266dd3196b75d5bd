"""Counts of kept positions, the quantities that every cost is computed from.

A dimension of a tensor is a vector of unit ids (-1 for positions that always stay). The number of kept positions is
linear in the mask, and units of a group that occur equally often in every vector are interchangeable: only the number
kept matters. Such units form a *class*; nearly always a group is a single class, so a mask over thousands of units
shrinks to a vector over a few dozen classes

    count[row] = fixed[row] + Σ_class multiplicity[row, class] · kept[class]

and all costs are closed forms of these counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pruning.engine.channel_graph import ChannelGraph

ONE = 0
"""Row whose count is always 1; pads products that have fewer factors than others."""


class Metric(Protocol):
    """A cost as a function of the counts."""

    def evaluate(self, counts: Tensor) -> Tensor:
        """Return the cost, (...,), for counts of all rows, (..., rows) float64; differentiable."""

    def part(self, rows: Tensor) -> Metric | None:
        """Return the summands that depend on any of these rows, (rows,) bool; None if the cost is not a sum."""


class OnDevices:
    """Constant float64 and index tensors, copied once to every device that requests them."""

    def __init__(self, **tensors: Tensor) -> None:
        self._copies = {torch.device("cpu"): tensors}

    def at(self, device: torch.device) -> dict[str, Tensor]:
        """Return all tensors on `device`, by name."""
        if device not in self._copies:
            origin = self._copies[torch.device("cpu")]
            self._copies[device] = {name: tensor.to(device) for name, tensor in origin.items()}
        return self._copies[device]


class CountTable:
    """Collects vectors of unit ids (`row`), then, after `settle`, counts the kept positions of each.

    Attributes:
        num_classes: Number of classes of interchangeable units; class i < number of groups belongs to group i.
    """

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._vectors: list[np.ndarray] = []
        self.num_classes = 0
        assert self.row(np.array([-1])) == ONE

    def row(self, units: np.ndarray) -> int:
        """Return the row of a vector of unit ids, -1 for positions that always stay. Equal vectors share a row."""
        vector = np.ascontiguousarray(units, dtype=np.int64).reshape(-1)
        number = self._numbers.setdefault(vector.tobytes(), len(self._vectors))
        if number == len(self._vectors):
            self._vectors.append(vector)
        return number

    def rows(self, vectors: Sequence[np.ndarray]) -> tuple[int, ...]:
        """Return the rows of several vectors."""
        return tuple(self.row(vector) for vector in vectors)

    def settle(self, graph: ChannelGraph) -> None:
        """Sort the units into classes. Rows requested later would not be counted."""
        per_unit = [np.bincount(v[v >= 0], minlength=graph.num_units) for v in self._vectors]
        self._classes: dict[int, np.ndarray] = {}
        columns: list[list[tuple[int, float]]] = [[] for _ in graph.groups]
        for group in graph.groups:
            table = np.stack([counts[group.units] for counts in per_unit], axis=1)  # (width, rows)
            distinct, kind = np.unique(table, axis=0, return_inverse=True)
            kind = kind.reshape(-1)
            names = [group.index, *range(len(columns), len(columns) + len(distinct) - 1)]
            columns += [[] for _ in names[1:]]
            self._classes[group.index] = np.array(names, dtype=np.int64)[kind]
            for name, occurrences in zip(names, distinct, strict=False):
                columns[name] = [(int(row), float(occurrences[row])) for row in np.flatnonzero(occurrences)]
        self.num_classes = len(columns)
        multiplicity = torch.zeros(len(self._vectors), self.num_classes, dtype=torch.float64)
        for name, column in enumerate(columns):
            for row, occurrences in column:
                multiplicity[row, name] = occurrences
        fixed = torch.tensor([float((v < 0).sum()) for v in self._vectors], dtype=torch.float64)
        self.multiplicity, self._constants = multiplicity, OnDevices(matrix=multiplicity.T, fixed=fixed)
        self._number_units(graph)

    def follow(self, graph: ChannelGraph) -> bool:
        """Update the widths after a rewrite.

        Returns:
            Whether that was possible. If a group with differing units has lost some, it is unknown which classes they
                belonged to, and the table has to be rebuilt.
        """
        for group in graph.groups:
            classes = self._classes[group.index]
            if group.width != len(classes):
                if len(np.unique(classes)) > 1:
                    return False
                self._classes[group.index] = classes[: group.width]
        self._number_units(graph)
        return True

    def _number_units(self, graph: ChannelGraph) -> None:
        self.class_of_unit = np.empty(graph.num_units, dtype=np.int64)
        for group in graph.groups:
            self.class_of_unit[group.units] = self._classes[group.index]
        self._unit_index = OnDevices(classes=torch.from_numpy(self.class_of_unit))

    def classes_of(self, group: int) -> np.ndarray:
        """Return the class of every unit of a group, (width,), in the order of the group's units."""
        return self._classes[group]

    def rows_touching(self, classes: np.ndarray) -> Tensor:
        """Return which counts depend on any of these classes, (rows,) bool."""
        return (self.multiplicity[:, torch.from_numpy(classes)] != 0).any(dim=1)

    def kept_per_class(self, mask: np.ndarray | Tensor | None) -> Tensor:
        """Return how many units of every class a mask keeps, (classes,) float64; differentiable for a tensor.

        Args:
            mask: (num_units,) bool or float in [0, 1]; None keeps all.
        """
        if isinstance(mask, Tensor):
            index = self._unit_index.at(mask.device)["classes"]
            zeros = torch.zeros(self.num_classes, dtype=torch.float64, device=mask.device)
            return zeros.index_add(0, index, mask.to(torch.float64))
        weights = None if mask is None else np.asarray(mask, dtype=np.float64)
        kept = np.bincount(self.class_of_unit, weights=weights, minlength=self.num_classes)
        return torch.from_numpy(kept.astype(np.float64, copy=False))

    def counts(self, kept: Tensor) -> Tensor:
        """Compute the counts of all rows, (..., rows), from numbers of kept units per class, (..., classes)."""
        constants = self._constants.at(kept.device)
        return kept @ constants["matrix"] + constants["fixed"]
