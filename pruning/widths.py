"""Whole numbers that modules hold and that stand for widths: which they are, and what they tie together.

A `forward` that views, splits or pads by `self.width` breaks when the width changes, unless the number follows.
Which number is meant can't be seen: the operators were given its value. So numbers are matched by value, within
the module that ran the operator, and trials tell whether that was right.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import numpy as np
from torch import nn

from pruning.channel_graph import ChannelGraph
from pruning.groups import AttributeAxis, vector_of
from pruning.labelling import Labeller

_SPATIAL_NAMES = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding"})


def hidden_widths(model: nn.Module, labeller: Labeller, graph: ChannelGraph) -> list[AttributeAxis]:
    """Whole numbers of modules that equal a width which an operator inside that module was given.

    A list that equals all the sizes of a split stands for them one by one. Where several other numbers of a
    module equal several widths (channels of padding before and behind), they are matched in order: of
    definition here, of use there.
    """
    modules = dict(model.named_modules())
    found = _split_lists(modules, labeller, graph)
    taken = {(axis.module, axis.attribute, axis.item) for axis in found}
    widths: dict[tuple[str, int], dict[tuple[int, ...], np.ndarray]] = {}
    for use in labeller.size_uses:
        units = vector_of(graph.unit_of_atom, use)
        if units is not None and units.size and units.max() >= 0:
            same = widths.setdefault((use.module, units.size), {})
            same.setdefault(tuple(np.sort(units).tolist()), units)
    for (name, size), same in widths.items():
        numbers = [
            (attribute, item)
            for attribute, item, value in _integers(modules[name])
            if value == size and (name, attribute, item) not in taken
        ]
        vectors = list(same.values())
        for position, (attribute, item) in enumerate(numbers):
            units = vectors[min(position, len(vectors) - 1)]
            found.append(AttributeAxis(name, attribute, item, units, found=True))
    return found


def _split_lists(
    modules: dict[str, nn.Module], labeller: Labeller, graph: ChannelGraph
) -> list[AttributeAxis]:
    """Lists that hold the sizes of all parts of a split, in order."""
    found: dict[tuple[str, str, int], AttributeAxis] = {}
    for parts in labeller.splits:
        name = parts[0].module
        sizes = [part.atoms.shape[part.dim] for part in parts]
        for attribute, value in vars(modules[name]).items():
            if type(value) not in (list, tuple) or list(value) != sizes:
                continue
            for item, part in enumerate(parts):
                units = vector_of(graph.unit_of_atom, part)
                if units is not None and units.max(initial=-1) >= 0:
                    axis = AttributeAxis(name, attribute, item, units, found=True)
                    found.setdefault((name, attribute, item), axis)
    return list(found.values())


def tie_widths(model: nn.Module, labeller: Labeller, names: Set[str]) -> bool:
    """Unite, within each of these modules, widths of the same size of which it holds a number.

    A number that counts several kinds of channels is right for all of them only if they lose the same.

    Returns:
        Whether there was any such number.
    """
    modules = dict(model.named_modules())
    sizes = {name: {value for _, _, value in _integers(modules[name]) if value > 1} for name in names}
    widths: dict[tuple[str, int], list[np.ndarray]] = {}
    for use in labeller.size_uses:
        extent = use.atoms.shape[use.dim]
        if use.module in names and extent in sizes[use.module]:
            atoms = np.moveaxis(use.atoms, use.dim, 0).reshape(extent, -1)[:, 0]
            if atoms.min() >= 0:
                widths.setdefault((use.module, extent), []).append(atoms)
    tied = False
    for first, *others in widths.values():
        for other in others:
            labeller.table.unite(first, other, "counted by the same number")
            tied = tied or not np.array_equal(first, other)
    return tied


def _integers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    if type(module).__module__.startswith("torch.nn") and not isinstance(
        module, (nn.Unflatten, nn.ChannelShuffle)
    ):
        return
    for name, value in vars(module).items():
        if name in _SPATIAL_NAMES:
            continue
        if type(value) is int:
            yield name, None, value
        elif type(value) in (list, tuple) and value and all(type(item) is int for item in value):
            yield from ((name, position, item) for position, item in enumerate(value))
