"""The cuts that every graph must stand: which units stay in a trial."""

from __future__ import annotations

import math
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
    """Between 30 % and 70 % of every prunable group's units stay, at random."""
    return _random_units(graph, 7, lambda width: range(round(width * 0.3), round(width * 0.7) + 1))


def random_few(graph: ChannelGraph) -> np.ndarray:
    """Between a tenth and a third of every prunable group's units stay, at random: as many as have no divisor in
    common with the width, and two at least, since one alone has no spread.

    A view by the old width, or by a part of it, then raises, unless positions or images make up for it.
    """
    return _random_units(graph, 11, _odd_and_few)


def _odd_and_few(width: int) -> Sequence[int]:
    odd = [count for count in range(2, width) if math.gcd(count, width) == 1]
    return [count for count in odd if width <= 10 * count <= 3.5 * width] or odd[:2]


def _random_units(graph: ChannelGraph, seed: int, counts_for: Callable[[int], Sequence[int]]) -> np.ndarray:
    """Of each group of one width another number of units stays, as far as the numbers for that width go round.

    Where they came out equal, a number that counts two kinds of channels would be right for both.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    mask = np.ones(graph.num_units, dtype=bool)
    rank: Counter[int] = Counter()
    for group in graph.prunable:
        counts = [count for count in counts_for(group.width) if 0 < count < group.width] or [1]
        count = counts[rank[group.width] % len(counts)]
        rank[group.width] += 1
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


#: The cuts that every graph must stand, each with whether passes that repeat others operator by operator are run too:
#: what only such a pass decides by a width comes out when widths are small, or equal.
MASKS: tuple[tuple[MaskMaker, bool], ...] = (
    (random_halves, False),
    (random_few, True),
    (equal_widths, True),
)
