"""Per-layer rates: which share of its channels each group loses, fixed beforehand.

Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017, section 4): some layers bear more than others, so each
gets a rate of its own. Park et al. (NeurIPS 2020) cut VGG-16 once by L1 norm, 30 % of the first and of the last six
convolutions and nothing between.
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

#: Above the error of a product in double precision: 0.7 of 10 are 7.
_ROUNDING = 1e-9


def parse_rates(words: Sequence[str], default: float | None) -> dict[str, float]:
    """Read `["features.0=0.5", "layer4.*"]`.

    Args:
        words: PATTERN=SHARE or PATTERN.
        default: The share of a pattern that names none.

    Raises:
        SettingError: A word is neither, its share is not between 0 and 1, or a pattern comes twice.
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
    """Every group whose name matches a pattern loses that share of its channels, the lowest-scored ones; at once.

    Args:
        rates: Name pattern (`layer4.*`) → share to remove; of several matches the last one holds. Groups that no
            pattern matches stay as they are.
    """

    rates: Mapping[str, float]

    def choose(self, situation: Situation) -> Decision:
        """See `Search`; the targets are what the rates come to (`share_left`)."""
        widths = self.widths(situation.graph)
        for group in situation.groups:
            if widths[group.index] < situation.width(group):
                situation.mask = situation.without(situation.lowest(group, widths[group.index]))
        return Decision(situation.keep(situation.mask))

    def widths(self, graph: ChannelGraph) -> dict[int, int]:
        """Group index → width after the cut.

        Raises:
            SettingError: A pattern that matches no group that can be pruned, or a rate beyond the least widths.
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
        # The channels that stay are rounded down, as Park et al. have it: 44 of 64 at 0.3.
        wanted = math.floor((1 - matching[-1]) * group.width + _ROUNDING)
        allowed = graph.allowed_widths(group)
        check_setting(
            wanted >= min(graph.min_width_of(group), group.width),
            "rates",
            f"{matching[-1]:g}",
            f"would leave {wanted} of {group.width} channels of {group.name}, but min_width and limits keep "
            f"{allowed[0]}: lower the rate or the limit",
        )
        # Where widths are rounded, the nearest one that is allowed; of two, the larger.
        return min(allowed, key=lambda width: (abs(width - wanted), -width))

    def share_left(self, graph: ChannelGraph, costs: CostModel) -> float:
        """The share of the MACs that the cut leaves.

        Raises:
            SettingError: Nothing would be cut, or see `widths`.
        """
        mask = np.ones(graph.num_units, dtype=bool)
        widths = self.widths(graph)
        for group in graph.prunable:
            mask[group.units[widths[group.index] :]] = False
        share = costs.cost("macs", mask) / costs.baseline("macs")
        given = ", ".join(f"{pattern}={rate:g}" for pattern, rate in self.rates.items())
        check_setting(share < 1, "rates", given, "too small to remove a single channel; raise them")
        return share
