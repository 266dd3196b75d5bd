"""Per-layer rates: the share of its channels that each group loses, fixed in advance.

Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017, section 4): some layers tolerate more than others, so
each gets its own rate. Park et al. (NeurIPS 2020) cut VGG-16 once by L1 norm, 30 % of the first and of the last six
convolutions and none in between.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence

import numpy as np

from image_classification.config import SettingError, check_setting, nearest
from pruning.costs.cost_model import CostModel
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.search.search import Decision, Situation

#: Exceeds the rounding error of a product in double precision: 0.7 of 10 is 7.
_ROUNDING = 1e-9


def parse_rates(words: Sequence[str], default: float | None) -> dict[str, float]:
    """Parse words such as `["features.0=0.5", "layer4.*"]`.

    Args:
        words: PATTERN=SHARE or PATTERN.
        default: Share for patterns without one.

    Raises:
        SettingError: A word has neither form, its share is not between 0 and 1, or a pattern occurs twice.
    """
    rates: dict[str, float] = {}
    for word in words:
        pattern, equals, value = word.partition("=")
        try:
            share = float(value) if equals else default
        except ValueError:
            share = None
        if not pattern or share is None or not 0 < share < 1:
            raise SettingError(
                "rates",
                word,
                "write PATTERN or PATTERN=SHARE with a share between 0 and 1, such as 'layer4.*=0.3'",
            )
        check_setting(pattern not in rates, "rates", pattern, "is given twice")
        rates[pattern] = share
    return rates


@dataclasses.dataclass
class RateSearch:
    """Removes the pattern's share of channels, the lowest-scored ones, from every group whose name matches; all at
    once.

    Args:
        rates: Name pattern (`layer4.*`) → share to remove; of several matches the last one counts. Groups that no
            pattern matches are left alone.
    """

    rates: Mapping[str, float]

    def choose(self, situation: Situation) -> Decision:
        """See `Search`; the targets are the costs that the rates lead to (`share_left`)."""
        widths = self.widths(situation.graph)
        for group in situation.groups:
            if widths[group.index] < situation.width(group):
                situation.mask = situation.without(situation.lowest(group, widths[group.index]))
        return Decision(situation.keep(situation.mask))

    def widths(self, graph: ChannelGraph) -> dict[int, int]:
        """Return group index → width after the cut.

        Raises:
            SettingError: A pattern matches no group that can be pruned, or a rate exceeds what the smallest widths
                allow.
        """
        names = [group.name for group in graph.prunable]
        for pattern in self.rates:
            check_setting(
                bool(fnmatch.filter(names, pattern)),
                "rates",
                pattern,
                f"no channel group that can be pruned has such a name{nearest(pattern, names)}; `python -m pruning "
                "groups` lists them",
            )
        return {group.index: self._width(graph, group) for group in graph.prunable}

    def _width(self, graph: ChannelGraph, group: Group) -> int:
        matching = [share for pattern, share in self.rates.items() if fnmatch.fnmatch(group.name, pattern)]
        if not matching:
            return group.width
        # The number of kept channels is rounded down, as in Park et al.: 44 of 64 at 0.3.
        wanted = math.floor((1 - matching[-1]) * group.width + _ROUNDING)
        allowed = graph.allowed_widths(group)
        check_setting(
            wanted >= min(graph.min_width_of(group), group.width),
            "rates",
            f"{matching[-1]:g}",
            f"would leave {wanted} of {group.width} channels of {group.name}, but min_width and limits keep "
            f"{allowed[0]}: lower the rate or the limit",
        )
        # If widths are rounded, take the nearest allowed one; of two, the larger.
        return min(allowed, key=lambda width: (abs(width - wanted), -width))

    def share_left(self, graph: ChannelGraph, costs: CostModel) -> float:
        """Return the share of the MACs that the cut leaves.

        Raises:
            SettingError: Nothing would be cut; or as for `widths`.
        """
        mask = np.ones(graph.num_units, dtype=bool)
        widths = self.widths(graph)
        for group in graph.prunable:
            mask[group.units[widths[group.index] :]] = False
        share = costs.cost("macs", mask) / costs.baseline("macs")
        given = ", ".join(f"{pattern}={rate:g}" for pattern, rate in self.rates.items())
        check_setting(share < 1, "rates", given, "too small to remove a single channel; raise them")
        return share
