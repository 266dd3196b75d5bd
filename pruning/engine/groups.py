"""Coupled channel groups: which slices of which tensors are removed together.

The atoms that label propagation has united form *units*: removing unit u means removing every slice that
carries it. Units that touch the same dimensions of the same tensors form a *group*; within a group every unit
can go on its own, so a group of width w has w − 1 smaller versions and no further constraint.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from image_classification.models.whole_numbers import Path

FROZEN = -1


@dataclasses.dataclass
class Axis:
    """One dimension of a parameter, a buffer, or a tensor in a plain attribute.

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

    `item` is the position within a list or tuple, or the way to it within other containers; None for a plain integer.
    `found` says that it was found by trial rather than known.
    """

    module: str
    attribute: str
    item: int | Path | None
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
        reason: Why not, in words; empty if prunable.
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
