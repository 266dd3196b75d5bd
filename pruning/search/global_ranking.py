"""One ranking over all groups by normalised score; the lowest units are removed until the target is met."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from pruning.criteria.combine import DEFAULT_NORMALISATION, Normalisation, normalise_scores
from pruning.engine.groups import Group
from pruning.search.search import Decision, Situation, register_search


@register_search("global")
@dataclasses.dataclass
class GlobalSearch:
    """One ranking over all groups; the lowest units are removed until the target is met.

    Args:
        normalisation: How scores of different groups are made comparable (`criteria.combine`); with `macs` the
            ranking is by score per cost saved.
    """

    normalisation: Normalisation = DEFAULT_NORMALISATION

    def choose(self, situation: Situation) -> Decision:
        """See `Search`."""
        while (metric := situation.most_behind()) is not None:
            steps = self._ranking(situation, metric)
            if not steps:
                break
            self._remove(situation, metric, steps)
        return Decision(situation.keep(situation.mask))

    def _ranking(self, situation: Situation, metric: str) -> list[np.ndarray]:
        """Return steps to the next smaller allowed width of some group, the least valuable first."""
        savings = {group.index: self._saving(situation, metric, group) for group in situation.groups}
        raw = {
            index: torch.from_numpy(scores) for index, scores in situation.scores.items() if index in savings
        }
        values = normalise_scores(raw, self.normalisation, savings)
        steps: list[tuple[float, np.ndarray]] = []
        for group in situation.groups:
            worth = -np.inf
            num_gone = 0
            for width in reversed(situation.widths_below(group)):
                units = situation.lowest(group, width)
                step = units[num_gone:]
                # At least the value of the previous step; otherwise a group would lose its better units first.
                mean = float(values[group.index][situation.graph.position_of_unit[step]].mean())
                worth = max(worth, mean)
                num_gone = len(units)
                steps.append((worth, step))
        steps.sort(key=lambda step: step[0])
        return [units for _, units in steps]

    @staticmethod
    def _saving(situation: Situation, metric: str, group: Group) -> float:
        """Return the cost saved by removing the group's lowest unit."""
        if situation.width(group) < 2:
            return 0.0
        without = situation.without(situation.lowest(group, situation.width(group) - 1))
        return situation.costs.cost(metric, situation.mask) - situation.costs.cost(metric, without)

    @staticmethod
    def _remove(situation: Situation, metric: str, steps: list[np.ndarray]) -> None:
        """Take the shortest prefix of the ranking that meets the target, by bisection."""
        target = situation.targets[metric] + 1e-9 * situation.costs.baseline(metric)

        def mask_after(count: int) -> np.ndarray:
            return situation.without(np.concatenate(steps[:count]))

        low, high = 1, len(steps)
        while low < high:
            middle = (low + high) // 2
            if situation.costs.cost(metric, mask_after(middle)) <= target:
                high = middle
            else:
                low = middle + 1
        situation.mask = mask_after(low)
