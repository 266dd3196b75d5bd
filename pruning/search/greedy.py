"""Kung and Hou's search (2020, Commun. Inf. Syst. 20(3)): one group at a time is narrowed to meet the whole target.

For every group there is one candidate: only this group loses its lowest-scored units until the target is met. The
candidates are sorted by the estimated change of the calibration loss, the first ones are measured, and the best is
taken. The published rewrites are small, half a percent of the cost. A large one would take most of a single group, so
the reduction is divided into instalments, each taken from the group that is best at that point. The first instalment
measures all candidates; later ones measure those that were best when last measured (Minoux's lazy greedy, 1978),
because the estimate does not know about repairs and would propose the same groups again and again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

from image_classification.config import check_setting
from pruning.search.search import DEFAULT_SHORTLIST, Candidate, Decision, Situation, register_search

#: Largest share of the original cost taken from a single group at once if the number of instalments is not given.
LARGEST_INSTALMENT = 0.02


@register_search("greedy")
@dataclasses.dataclass
class GreedySearch:
    """Narrows the group that can meet the target at the smallest rise of the calibration loss.

    Args:
        shortlist: Number of candidates measured, in order of the estimate; 0 measures all, 1 trusts the estimate.
        instalments: Number of parts that the reduction is divided into, each taken from one group; 1 as published. None
            for as many as keep each part at 2 % of the original cost.
    """

    shortlist: int = DEFAULT_SHORTLIST
    instalments: int | None = None

    def __post_init__(self) -> None:
        check_setting(self.shortlist >= 0, "shortlist", self.shortlist, "must not be negative")
        enough = self.instalments is None or self.instalments >= 1
        check_setting(enough, "instalments", self.instalments, "at least 1 is needed")

    def choose(self, situation: Situation) -> Decision:
        """See `Search`.

        If no single group can meet the target, the best one is narrowed as far as allowed, then another.
        """
        stages: list[list[Candidate]] = []
        ends = dict(situation.targets)
        starts = {metric: situation.costs.cost(metric, situation.mask) for metric in ends}
        instalments = self.instalments or self._small_instalments(situation)
        rises = None if instalments == 1 or self.shortlist == 1 else _Rises()
        for part in range(1, instalments + 1):
            done = part / instalments
            situation.targets = {
                metric: end + (1 - done) * max(starts[metric] - end, 0.0) for metric, end in ends.items()
            }
            stages += self._towards_targets(situation, rises)
        return Decision(situation.keep(situation.mask), stages[0] if stages else [])

    @staticmethod
    def _small_instalments(situation: Situation) -> int:
        """Return the number of instalments that keeps each at `LARGEST_INSTALMENT` of the original cost."""
        costs = situation.costs
        ways = [
            (costs.cost(metric, situation.mask) - target) / costs.baseline(metric)
            for metric, target in situation.targets.items()
        ]
        # Without this tolerance, 0.1 / 0.02 might be slightly more than 5.
        return max(1, math.ceil(max(ways, default=0.0) / LARGEST_INSTALMENT - 1e-6))

    def _towards_targets(self, situation: Situation, rises: _Rises | None) -> list[list[Candidate]]:
        """Close units of the situation's mask until the targets are met or nothing is left; return the candidates
        considered.
        """
        stages: list[list[Candidate]] = []
        while (metric := situation.most_behind()) is not None:
            options = self._options(situation, metric)
            if not options:
                break
            if rises is None or not rises.known:
                best, candidates = self._best(situation, options, self.shortlist if rises is None else 0)
            else:
                best, candidates = self._best_again(situation, options, rises.least(options, self.shortlist))
            if rises is not None:
                rises.learn(situation, candidates, best)
            stages.append(candidates)
            situation.mask = situation.without(options[best])
        return stages

    def _options(self, situation: Situation, metric: str) -> dict[int, np.ndarray]:
        """Return group index → units it would lose to meet the target alone, or to save as much as it can.

        It is possible that no group saves anything by itself: memory is the largest of several moments, and two may be
        equally large. Then every group that the cost depends on is offered, with the share of units that is in excess.
        """
        costs = situation.costs
        small = 1e-9 * costs.baseline(metric)
        now = costs.cost(metric, situation.mask)
        target = situation.targets[metric] + small
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
        """Return group index → units to remove to keep this share, for groups that the cost depends on."""
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

    @staticmethod
    def _best_again(
        situation: Situation, options: Mapping[int, np.ndarray], indices: list[int]
    ) -> tuple[int, list[Candidate]]:
        """Return which of these groups has the smallest loss, and all their candidates."""
        judge = situation.loss_change
        assert judge is not None, "the greedy search judges by calibration data"
        cuts = [situation.keep(situation.without(options[index])) for index in indices]
        losses = judge.measure(cuts).tolist()
        candidates = [
            Candidate(situation.graph.groups[index].name, len(options[index]), None, loss)
            for index, loss in zip(indices, losses, strict=True)
        ]
        return indices[int(np.argmin(losses))], candidates

    def _best(
        self, situation: Situation, options: Mapping[int, np.ndarray], shortlist: int
    ) -> tuple[int, list[Candidate]]:
        """Return the group of the option with the smallest loss, and all candidates considered.

        Options without an estimate are always measured, unless only the estimate is used; then they come last.
        """
        judge = situation.loss_change
        assert judge is not None, "the greedy search judges by calibration data"
        indices = list(options)
        estimated = judge.estimate(list(options.values()), closed=np.flatnonzero(~situation.mask))
        order = np.argsort(estimated, kind="stable")  # NaN sorts last
        truth: dict[int, float] = {}
        if shortlist != 1:
            unknown = order[np.isnan(estimated[order])]
            short = order[: shortlist or None]
            chosen = [*short, *unknown[~np.isin(unknown, short)]]
            cuts = [situation.keep(situation.without(options[indices[i]])) for i in chosen]
            truth = {int(i): float(loss) for i, loss in zip(chosen, judge.measure(cuts), strict=True)}
        best = min(truth, key=lambda i: truth[i]) if truth else int(order[0])
        candidates = []
        for i in order.tolist():
            name = situation.graph.groups[indices[i]].name
            estimate = None if np.isnan(estimated[i]) else float(estimated[i])
            candidates.append(Candidate(name, len(options[indices[i]]), estimate, truth.get(i)))
        return indices[best], candidates


class _Rises:
    """Rise of the loss by each group's candidate when last measured."""

    def __init__(self) -> None:
        self.known: dict[int, float] = {}
        self._present: float | None = None

    def learn(self, situation: Situation, candidates: list[Candidate], best: int) -> None:
        """Record the measurements, and the loss after taking the best candidate."""
        judge = situation.loss_change
        assert judge is not None, "it has measured"
        present = judge.loss_as_it_is() if self._present is None else self._present
        indices = {group.name: group.index for group in situation.groups}
        losses = {indices[one.group]: one.measured for one in candidates if one.measured is not None}
        self.known |= {index: loss - present for index, loss in losses.items()}
        self._present = losses[best]

    def least(self, options: Mapping[int, np.ndarray], count: int) -> list[int]:
        """Return the indices of the groups with the smallest rises; groups never measured come first.

        Args:
            options: Group index → units, of the groups to choose from.
            count: Number of groups; 0 for all.
        """
        return sorted(options, key=lambda index: self.known.get(index, -np.inf))[: count or None]
