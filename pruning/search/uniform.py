"""Uniform search: every group keeps the same share of its units, those with the highest scores."""

from __future__ import annotations

import dataclasses

import numpy as np

from pruning.search.search import Decision, Situation, register_search


@register_search("uniform")
@dataclasses.dataclass
class UniformSearch:
    """Keeps the same share of every group's current units; the share is the largest that meets the targets."""

    def choose(self, situation: Situation) -> Decision:
        """See `Search`."""
        if situation.most_behind() is None:
            return Decision({})
        start = situation.mask
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            situation.mask = self._mask(situation, start, middle)
            if situation.most_behind() is None:
                low = middle
            else:
                high = middle
        situation.mask = self._mask(situation, start, low)
        return Decision(situation.keep(situation.mask))

    @staticmethod
    def _mask(situation: Situation, start: np.ndarray, share: float) -> np.ndarray:
        """Return the mask in which every group keeps at most `share` of its units, or its smallest width."""
        situation.mask = start
        mask = start.copy()
        for group in situation.groups:
            below = situation.widths_below(group)
            if share < 1 and below:
                fitting = [width for width in below if width <= share * situation.width(group)]
                mask[situation.lowest(group, fitting[-1] if fitting else below[0])] = False
        return mask
