"""Search: which channels give way at a rewrite. Calibration data decides; validation data is never seen.

Three ways to reach the next target of the budget's course:

- `greedy` (Kung & Hou 2020): for every group the candidate "this group alone pays", losing its lowest-scored units. A
  shortlist by estimated loss change is then measured, and the best candidate is taken.
- `global`: one ranking over all groups by normalised score; units go from the bottom until the target is met.
- `uniform`: every group keeps the same share, its highest-scored units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from pruning.channel_graph import ChannelGraph
from pruning.cost import CostModel
from pruning.criteria.combine import DEFAULT_NORMALISATION, normalise_scores
from pruning.groups import Group
from pruning.loss_change import LossChange

Scores = Mapping[int, np.ndarray]
SEARCHES = ("greedy", "global", "uniform")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to pay: a group that loses units.

    Attributes:
        group: Its name.
        num_units: How many it would lose.
        estimated: Change of the calibration loss; None where the estimate has nothing to go by.
        measured: Calibration loss without them; None if that was not measured.
    """

    group: str
    num_units: int
    estimated: float | None
    measured: float | None = None


@dataclasses.dataclass
class Decision:
    """What a search chose.

    Attributes:
        keep: Group index → positions that stay, ascending; only groups that change.
        candidates: What was weighed first, best estimate first (greedy only).
        loss: Calibration loss after the cut, where the search has measured just that.
    """

    keep: dict[int, np.ndarray]
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    loss: float | None = None


@dataclasses.dataclass
class Situation:
    """Everything a search may look at.

    Attributes:
        graph: Groups with their constraints.
        costs: Cost of any mask.
        scores: Group index → (width,) importance, larger is better; comparable within a group.
        targets: Metric → cost to end at.
        loss_change: Judges candidates on calibration data; None where no data is at hand (global and uniform).
    """

    graph: ChannelGraph
    costs: CostModel
    scores: Scores
    targets: Mapping[str, float]
    loss_change: LossChange | None = None

    def __post_init__(self) -> None:
        self.mask = np.ones(self.graph.num_units, dtype=bool)
        # A group that the criterion had nothing to go by stays as it is.
        self.groups = [group for group in self.graph.prunable if group.index in self.scores]

    def most_behind(self) -> str | None:
        """The metric that is furthest above its target, relative to the baseline; None when all are met."""
        excess = {
            metric: (self.costs.cost(metric, self.mask) - target) / self.costs.baseline(metric)
            for metric, target in self.targets.items()
        }
        metric = max(excess, key=lambda name: excess[name])
        return metric if excess[metric] > 1e-9 else None

    def width(self, group: Group) -> int:
        """Units of a group that are still there."""
        return int(self.mask[group.units].sum())

    def widths_below(self, group: Group) -> list[int]:
        """Allowed widths below the present one, ascending."""
        return [width for width in self.graph.allowed_widths(group) if width < self.width(group)]

    def leaving(self, group: Group) -> np.ndarray:
        """Positions of the group's units that are still there, in the order they leave: the lowest-scored one first."""
        kept = np.flatnonzero(self.mask[group.units])
        # A stable order makes ties, and with them the choice, the same on every machine.
        return kept[np.argsort(self.scores[group.index][kept], kind="stable")]

    def lowest(self, group: Group, width: int) -> np.ndarray:
        """Unit ids that leave when the group shrinks to `width`."""
        return group.units[self.leaving(group)[: self.width(group) - width]]

    def without(self, units: np.ndarray) -> np.ndarray:
        """The present mask less these units."""
        mask = self.mask.copy()
        mask[units] = False
        return mask

    def keep(self, mask: np.ndarray) -> dict[int, np.ndarray]:
        """A mask as positions per changed group."""
        kept = {group.index: np.flatnonzero(mask[group.units]) for group in self.groups}
        return {
            index: positions
            for index, positions in kept.items()
            if len(positions) < self.graph.groups[index].width
        }


class Search(Protocol):
    """Chooses what leaves, so that every metric ends at or below its target."""

    def choose(self, situation: Situation) -> Decision: ...


@dataclasses.dataclass
class GreedySearch:
    """Kung and Hou's search: the group whose payment hurts least pays.

    Args:
        shortlist: Candidates that are measured after the estimate has sorted them; 0 measures all, 1 trusts the
            estimate.
    """

    shortlist: int = 4

    def choose(self, situation: Situation) -> Decision:
        """See `Search`. When no single group can pay, the one that hurts least pays what it can, then the next."""
        stages: list[list[Candidate]] = []
        chosen: list[float | None] = []
        while (metric := situation.most_behind()) is not None:
            options = self._options(situation, metric)
            if not options:
                break
            best, loss, candidates = self._best(situation, options)
            stages.append(candidates)
            chosen.append(loss)
            situation.mask = situation.without(options[best])
        keep = situation.keep(situation.mask)
        return Decision(keep, stages[0] if stages else [], chosen[0] if len(chosen) == 1 else None)

    def _options(self, situation: Situation, metric: str) -> dict[int, np.ndarray]:
        """Group index → units that it would lose to meet the target alone, or else to save as much as it can.

        Where no group saves anything by itself (memory is the largest of several moments, which may be equally
        large), all those that have a part in it may lose the share that is too much.
        """
        costs = situation.costs
        small = 1e-9 * costs.baseline(metric)
        now, target = costs.cost(metric, situation.mask), situation.targets[metric] + small
        whole: dict[int, np.ndarray] = {}
        partial: dict[int, np.ndarray] = {}
        for group in situation.groups:
            widths = situation.widths_below(group)
            if not widths:
                continue
            curve = costs.cost_curve(metric, group, situation.mask, situation.leaving(group))
            enough = [width for width in widths if curve[width] <= target]
            most = min(curve[width] for width in widths)
            if enough:
                whole[group.index] = situation.lowest(group, max(enough))
            elif most < now - small:
                width = max(width for width in widths if curve[width] <= most + small)
                partial[group.index] = situation.lowest(group, width)
        return whole or partial or self._together(situation, metric, target / now)

    @staticmethod
    def _together(situation: Situation, metric: str, share: float) -> dict[int, np.ndarray]:
        """Group index → units that go if it keeps this share, for groups that the cost depends on."""
        gates = torch.from_numpy(situation.mask.astype(np.float64)).requires_grad_()
        situation.costs.cost(metric, gates).backward()
        assert gates.grad is not None
        found = {}
        for group in situation.groups:
            widths = situation.widths_below(group)
            if widths and bool(gates.grad[torch.from_numpy(group.units)].any()):
                fitting = [width for width in widths if width <= share * situation.width(group)]
                found[group.index] = situation.lowest(group, fitting[-1] if fitting else widths[0])
        return found

    def _best(
        self, situation: Situation, options: Mapping[int, np.ndarray]
    ) -> tuple[int, float | None, list[Candidate]]:
        """The option that hurts least: its group, the loss with it if that was measured, and all that were weighed.

        Options without an estimate are always measured, unless the estimate alone is trusted: then they come last.
        """
        judge = situation.loss_change
        assert judge is not None, "the greedy search judges by calibration data"
        indices = list(options)
        estimated = judge.estimate(list(options.values()))
        order = np.argsort(estimated, kind="stable")  # NaN goes last
        truth: dict[int, float] = {}
        if self.shortlist != 1:
            unknown = order[np.isnan(estimated[order])]
            short = order[: self.shortlist or None]
            chosen = [*short, *unknown[~np.isin(unknown, short)]]
            measured = judge.measure([situation.keep(situation.without(options[indices[i]])) for i in chosen])
            truth = {int(i): float(loss) for i, loss in zip(chosen, measured, strict=True)}
        best = min(truth, key=lambda i: truth[i]) if truth else int(order[0])
        candidates = [
            Candidate(
                situation.graph.groups[indices[i]].name,
                len(options[indices[i]]),
                None if np.isnan(estimated[i]) else float(estimated[i]),
                truth.get(i),
            )
            for i in order.tolist()
        ]
        return indices[best], truth.get(best), candidates


@dataclasses.dataclass
class GlobalSearch:
    """One ranking over all groups; units go from the bottom until the target is met.

    Args:
        normalisation: How scores of different groups are made comparable (`criteria.combine`); with `macs` the
            ranking is by score per cost saved.
    """

    normalisation: str = DEFAULT_NORMALISATION

    def choose(self, situation: Situation) -> Decision:
        """See `Search`."""
        while (metric := situation.most_behind()) is not None:
            steps = self._ranking(situation, metric)
            if not steps:
                break
            self._remove(situation, metric, steps)
        return Decision(situation.keep(situation.mask))

    def _ranking(self, situation: Situation, metric: str) -> list[np.ndarray]:
        """Steps to the next smaller allowed width of some group, the least valuable first."""
        savings = {group.index: self._saving(situation, metric, group) for group in situation.groups}
        raw = {
            index: torch.from_numpy(scores) for index, scores in situation.scores.items() if index in savings
        }
        values = normalise_scores(raw, self.normalisation, savings)
        steps: list[tuple[float, np.ndarray]] = []
        for group in situation.groups:
            worth, num_gone = -np.inf, 0
            for width in reversed(situation.widths_below(group)):
                units = situation.lowest(group, width)
                step = units[num_gone:]
                # Never cheaper than the step before it, or a group would lose its better units first.
                mean = float(values[group.index][situation.graph.position_of_unit[step]].mean())
                worth, num_gone = max(worth, mean), len(units)
                steps.append((worth, step))
        steps.sort(key=lambda step: step[0])
        return [units for _, units in steps]

    @staticmethod
    def _saving(situation: Situation, metric: str, group: Group) -> float:
        """Cost that the group's lowest unit saves."""
        if situation.width(group) < 2:
            return 0.0
        without = situation.without(situation.lowest(group, situation.width(group) - 1))
        return situation.costs.cost(metric, situation.mask) - situation.costs.cost(metric, without)

    @staticmethod
    def _remove(situation: Situation, metric: str, steps: list[np.ndarray]) -> None:
        """Take the shortest beginning of the ranking that meets the target, by bisection."""
        target = situation.targets[metric] + 1e-9 * situation.costs.baseline(metric)

        def mask_after(count: int) -> np.ndarray:
            return situation.without(np.concatenate(steps[:count]))

        low, high = 1, len(steps)
        while low < high:
            middle = (low + high) // 2
            met = situation.costs.cost(metric, mask_after(middle)) <= target
            low, high = (low, middle) if met else (middle + 1, high)
        situation.mask = mask_after(low)


@dataclasses.dataclass
class UniformSearch:
    """Every group keeps the same share of its present units; the share is the largest that meets the targets."""

    def choose(self, situation: Situation) -> Decision:
        """See `Search`."""
        if situation.most_behind() is None:
            return Decision({})
        start = situation.mask
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            situation.mask = self._mask(situation, start, middle)
            low, high = (middle, high) if situation.most_behind() is None else (low, middle)
        situation.mask = self._mask(situation, start, low)
        return Decision(situation.keep(situation.mask))

    @staticmethod
    def _mask(situation: Situation, start: np.ndarray, share: float) -> np.ndarray:
        """The mask in which every group keeps at most `share` of its units, or its least width."""
        situation.mask = start
        mask = start.copy()
        for group in situation.groups:
            below = situation.widths_below(group)
            if share < 1 and below:
                fitting = [width for width in below if width <= share * situation.width(group)]
                mask[situation.lowest(group, fitting[-1] if fitting else below[0])] = False
        return mask


def build_search(name: str, shortlist: int = 4, normalisation: str = DEFAULT_NORMALISATION) -> Search:
    """The search called `name`, one of `SEARCHES`.

    Args:
        name: Its name.
        shortlist: Of the greedy search.
        normalisation: Of the global search.

    Raises:
        ValueError: There is no such search.
    """
    searches: dict[str, Search] = {
        "greedy": GreedySearch(shortlist),
        "global": GlobalSearch(normalisation),
        "uniform": UniformSearch(),
    }
    if name not in searches:
        raise ValueError(f"--pruning-search {name}: choose one of {', '.join(SEARCHES)}")
    return searches[name]
