"""The cuts that every graph must stand: which units stay in a trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group

MaskMaker = Callable[[ChannelGraph], np.ndarray]


def random_mask(graph: ChannelGraph, groups: Sequence[Group], seed: int = 7) -> np.ndarray:
    """Between 30 % and 70 % of each of these groups' units stay, differently for each group."""
    generator = np.random.Generator(np.random.Philox(seed))
    mask = np.ones(graph.num_units, dtype=bool)
    for group in groups:
        count = int(np.clip(round(group.width * generator.uniform(0.3, 0.7)), 1, group.width - 1))
        mask[group.units] = False
        mask[group.units[generator.choice(group.width, count, replace=False)]] = True
    return mask


def random_halves(graph: ChannelGraph) -> np.ndarray:
    """Random halves of all prunable groups, more or less."""
    return random_mask(graph, graph.prunable)


def one_in_ten(graph: ChannelGraph) -> np.ndarray:
    """Every prunable group keeps a tenth, at random; two units at least, since one alone has no spread."""
    generator = np.random.Generator(np.random.Philox(11))
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        count = min(max(2, round(group.width / 10)), group.width - 1)
        mask[group.units] = False
        mask[group.units[generator.choice(group.width, count, replace=False)]] = True
    return mask


def equal_widths(graph: ChannelGraph) -> np.ndarray:
    """The last units of all prunable groups stay, as many in each if it is wide enough.

    A forward that compares two widths decides otherwise when they come out equal, and a slice that ends at a fixed
    number meets other channels when those before it go.
    """
    mask = np.ones(graph.num_units, dtype=bool)
    if graph.prunable:
        common = max(1, min(group.width for group in graph.prunable) // 2)
        for group in graph.prunable:
            mask[group.units[: group.width - common]] = False
    return mask


def all_but_one(graph: ChannelGraph) -> np.ndarray:
    """The first unit of every prunable group goes. What stays has no divisor in common with the old width."""
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        mask[group.units[0]] = False
    return mask


def different_widths(graph: ChannelGraph) -> np.ndarray:
    """Groups of one width keep different numbers of units, as far as they go round, and two at least.

    Random numbers can come out equal, and then a number that counts two kinds of channels is right for both.
    """
    mask = np.ones(graph.num_units, dtype=bool)
    rank: Counter[int] = Counter()
    for group in graph.prunable:
        count = min(2 + rank[group.width] % max(1, group.width - 2), group.width - 1)
        mask[group.units[count:]] = False
        rank[group.width] += 1
    return mask


#: The cuts that every graph must stand.
MASKS: tuple[MaskMaker, ...] = (random_halves, one_in_ten, equal_widths, different_widths)
