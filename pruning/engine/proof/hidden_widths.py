"""Integer attributes of modules that are widths: how they are found, and which channels they tie together.

A `forward` that views, splits or pads by `self.width` breaks when the width changes, unless the number follows. Which
attribute is used cannot be observed, since operators only receive its value. So attributes are matched by value, within
the module that ran the operator, and trials show whether the match is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set

import numpy as np
from torch import nn

from image_classification.models.module_tree import named_modules
from image_classification.models.whole_numbers import Path, is_nested, numbers_in
from pruning.engine.case import Case
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.coupling import vector_of
from pruning.engine.groups import AttributeAxis
from pruning.engine.labeller import Labeller, SizeUse
from pruning.engine.labels import support
from pruning.engine.native_layers import is_native

_SPATIAL_NAMES = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding"})


def hidden_widths(model: nn.Module, labeller: Labeller, graph: ChannelGraph) -> list[AttributeAxis]:
    """Whole numbers of modules that equal a width which an operator in the module was given, or one of its own.

    A list that equals all the sizes of a split stands for them one by one. Where several other numbers of a
    module equal several widths (channels of padding before and behind), they are matched in order: of
    definition here, of use there.
    """
    modules = dict(named_modules(model))
    found = _split_lists(modules, labeller, graph)
    taken = {(axis.module, axis.attribute, axis.item) for axis in found}
    widths: dict[tuple[str, int], dict[tuple[int, ...], np.ndarray]] = {}
    for use in labeller.size_uses:
        units = vector_of(graph.unit_of_atom, use)
        if units is not None and units.size and units.max() >= 0 and not _counts_images(use, units):
            same = widths.setdefault((use.module, units.size), {})
            same.setdefault(tuple(np.sort(units).tolist()), units)
    for place in graph.places:  # `assert x.shape[1] == self.channels`
        same = widths.setdefault((place.module, place.units.size), {})
        same.setdefault(tuple(np.sort(place.units).tolist()), place.units)
    for (name, size), same in widths.items():
        numbers = [
            (attribute, item)
            for attribute, item, value in _integers(modules[name])
            if value == size and (name, attribute, item) not in taken
        ]
        vectors = list(same.values())
        # A private copy of a number (`_sizes` of `sizes`) stands for the same width, and has its place in the order.
        counts: Counter[str] = Counter()
        order: dict[tuple[str, int], int] = {}
        for attribute, item in numbers:
            position = order.setdefault((public(attribute), counts[attribute]), len(order))
            counts[attribute] += 1
            units = vectors[min(position, len(vectors) - 1)]
            found.append(AttributeAxis(name, attribute, item, units, found=True))
    return found


def public(attribute: str) -> str:
    """Return the public name that a private copy of an attribute shares."""
    return attribute.lstrip("_")


def _counts_images(use: SizeUse, counted: np.ndarray) -> bool:
    """Whether heads lie in the batch dimension: their number times that of images stands there.

    Args:
        use: What is counted.
        counted: Labels or units along the counted dimension.
    """
    return use.atoms.ndim > 1 and use.dim == 0 and np.unique(counted).size < counted.size


def _split_lists(
    modules: dict[str, nn.Module], labeller: Labeller, graph: ChannelGraph
) -> list[AttributeAxis]:
    """Return the lists that hold the sizes of all parts of a split, in order."""
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


def tie_widths(model: nn.Module, labeller: Labeller, numbers: Set[tuple[str, str]]) -> bool:
    """Unite, within a module, widths of the same size as a number that it holds.

    A number that counts several kinds of channels is right for all of them only if they lose the same.

    Args:
        model: The network.
        labeller: Its labels.
        numbers: (module, attribute) of the numbers; the name of an attribute as `public` gives it.

    Returns:
        Whether there was any such number.
    """
    modules = dict(named_modules(model))
    names = {name for name, _ in numbers}
    sizes: dict[str, set[int]] = {name: set() for name in names}
    for name in names:
        for attribute, _, value in _integers(modules[name]):
            if value > 1 and (name, public(attribute)) in numbers:
                sizes[name].add(value)
    widths: dict[tuple[str, int], list[np.ndarray]] = {}
    for use in labeller.size_uses:
        extent = use.atoms.shape[use.dim]
        if use.module in names and extent in sizes[use.module]:
            atoms = _counted(use)
            if atoms.min() >= 0 and not _counts_images(use, atoms):
                widths.setdefault((use.module, extent), []).append(atoms)
    tied = False
    for first, *others in widths.values():
        for other in others:
            labeller.table.unite(first, other, "counted by the same number")
            tied = tied or not np.array_equal(first, other)
    return tied


def tie_shapes(case: Case, labeller: Labeller, names: Set[str], ties: str) -> bool:
    """Unite, within each of these modules, widths that may have been computed from each other.

    `c = x.shape[1]` and later `y.view(n, heads, c // heads, -1)` asks that y follows x. All that can be seen is that
    the module reads x, and that it counts channels of a tensor of the same extent, or of a divisor of it.

    Args:
        case: The network.
        labeller: Its labels.
        names: The modules.
        ties: Which: "last", what a module is given and the last tensor of that extent; "input", all of that extent;
            "divisors", of divisors of it too; "parts", what its parts are given and give, and tensors of these extents.

    Returns:
        Whether there was anything to unite.
    """
    tied = False
    root = labeller.table.components()
    stays = labeller.table.frozen(root)[root]
    for number, trace in enumerate(case.traces):
        widths: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for call in trace.calls:
            parent = call.module.rpartition(".")[0]
            if ties != "parts" and call.module in names:
                widths[call.module] += _vectors(labeller, number, call.inputs[:1])
            elif ties == "parts" and call.module and parent in names:
                widths[parent] += _vectors(labeller, number, (*call.inputs[:1], *call.outputs[:1]))
        done: set[tuple[str, int]] = set()
        for use in reversed(labeller.size_uses):
            for width in widths.get(use.module, ()):
                if stays[width].any():  # what is computed from a fixed width is fixed too
                    continue
                key = (use.module, width.size)
                if key in done and ties == "last":
                    continue
                if _tie_shape(labeller, width, use, ties == "divisors"):
                    done.add(key)
        tied = tied or bool(done)
    return tied


def _tie_shape(labeller: Labeller, width: np.ndarray, use: SizeUse, divisors: bool) -> bool:
    """Unite a width with what a size use counts, if that has the same extent, or a divisor of it."""
    extent = use.atoms.shape[use.dim]
    if extent < 2 or width.size % extent or (extent < width.size and not divisors):
        return False
    counted = _counted(use)
    blocks = width.reshape(-1, extent)
    if counted.min() < 0 or _counts_images(use, counted) or (blocks == counted).all():
        return False
    labeller.table.unite(blocks, counted[None], "counted by the same number")
    return True


def _vectors(labeller: Labeller, trace: int, values: Sequence[int]) -> list[np.ndarray]:
    """Labels of tensors along each dimension that carries some, where these differ along no other."""
    found = []
    for value in values:
        known = labeller.values[trace][value]
        for slot in () if known is None else known.slots:
            if len(support(slot)) == 1 and slot.min() >= 0:
                found.append(slot.reshape(-1))
    return found


def _counted(use: SizeUse) -> np.ndarray:
    """The labels that a size use counts, taken at the first position of all other dimensions."""
    extent = use.atoms.shape[use.dim]
    return np.moveaxis(use.atoms, use.dim, 0).reshape(extent, -1)[:, 0]


def _integers(module: nn.Module) -> Iterator[tuple[str, int | Path | None, int]]:
    """(attribute, position or path within it, value) of the whole numbers that a module holds."""
    if is_native(module) and not isinstance(module, (nn.Unflatten, nn.ChannelShuffle, nn.Transformer)):
        return
    for name, value in vars(module).items():
        if name in _SPATIAL_NAMES:
            continue
        if type(value) is int:
            yield name, None, value
        elif type(value) in (list, tuple) and value and all(type(item) is int for item in value):
            yield from ((name, position, item) for position, item in enumerate(value))
        elif not name.startswith("_") or hasattr(
            module, name.lstrip("_")
        ):  # PyTorch's own tables hold no widths
            for path, number in numbers_in(value) if is_nested(value) else ():
                yield name, path, number
