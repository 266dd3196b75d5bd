"""Sensitivity search: widths are chosen by how the loss rises as each group is narrowed alone, per cost saved.

Every group is narrowed on its own to some shares of its width, and the calibration loss is measured for each (after the
repair, if there is one). Then steps along these curves are taken, always the one with the smallest rise of the loss per
cost saved, until the target is met. The rises of different groups are added: an approximation, which keeps the number
of measurements at groups × shares.

A local error of each layer would be cheaper, but says little about what the network loses.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from image_classification.config import check_setting
from pruning.engine.groups import Group
from pruning.search.global_ranking import GlobalSearch
from pruning.search.search import Candidate, Decision, Situation, register_search

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


@dataclasses.dataclass(frozen=True)
class Curves:
    """The effect of narrowing each group alone.

    Attributes:
        losses: Group index → width → loss, non-decreasing as the width falls.
        measured: All measurements.
    """

    losses: dict[int, dict[int, float]]
    measured: list[Candidate]


@register_search("sensitivity")
@dataclasses.dataclass
class SensitivitySearch:
    """Takes steps along the groups' curves of loss over width.

    Args:
        shares: Shares of its width to which a group is narrowed.
        limit: A curve ends where the loss has risen by this fraction of its original value, or of 1 if that is larger.
    """

    shares: tuple[float, ...] = SHARES
    limit: float = 1.0

    def __post_init__(self) -> None:
        good = bool(self.shares) and all(0 < share < 1 for share in self.shares)
        check_setting(good, "shares", self.shares, "give shares between 0 and 1")

    def choose(self, situation: Situation) -> Decision:
        """See `Search`."""
        if situation.most_behind() is None:
            return Decision({})
        curves = self.curves(situation)
        candidates = sorted(curves.measured, key=lambda candidate: candidate.measured or 0.0)
        return Decision(self.choose_along(situation, curves), candidates)

    def choose_along(self, situation: Situation, curves: Curves) -> dict[int, np.ndarray]:
        """Return group index → positions that stay, for the situation's targets.

        Args:
            situation: The situation; its mask is modified.
            curves: Curves of the same network, from `curves`.
        """
        while (metric := situation.most_behind()) is not None:
            step = self._next(situation, metric, curves.losses)
            if step is None:  # the curves end above the target
                return GlobalSearch().choose(situation).keep
            self._narrow(situation, metric, *step)
        return situation.keep(situation.mask)

    def curves(self, situation: Situation) -> Curves:
        """Measure the loss along the widths of every group, each on its own, up to the limit."""
        judge = situation.loss_change
        assert judge is not None, "the sensitivity search judges by calibration data"
        before = judge.loss_as_it_is()
        limit = before + self.limit * max(abs(before), 1.0)
        curves = {group.index: {situation.width(group): before} for group in situation.groups}
        candidates: list[Candidate] = []
        active = list(situation.groups)
        for share in sorted(self.shares, reverse=True):
            tried = [(group, self._width(situation, group, share)) for group in active]
            tried = [(group, width) for group, width in tried if width not in (0, *curves[group.index])]
            cuts = [
                situation.keep(situation.without(situation.lowest(group, width))) for group, width in tried
            ]
            losses = judge.measure(cuts) if cuts else np.zeros(0)
            for (group, width), loss in zip(tried, losses.tolist(), strict=True):
                curve = curves[group.index]
                candidates.append(Candidate(group.name, situation.width(group) - width, None, loss))
                curve[width] = max(loss, *curve.values())
            active = [group for group in active if max(curves[group.index].values()) < limit]
        return Curves(curves, candidates)

    @staticmethod
    def _width(situation: Situation, group: Group, share: float) -> int:
        """Return the allowed width nearest to a share, below the current one; 0 if there is none."""
        widths = situation.widths_below(group)
        wanted = share * situation.width(group)
        return min(widths, key=lambda width: abs(width - wanted), default=0)

    @staticmethod
    def _next(
        situation: Situation, metric: str, curves: dict[int, dict[int, float]]
    ) -> tuple[Group, int] | None:
        """Return the group and width with the smallest rise of the loss per cost saved; None if nothing saves any."""
        now = situation.costs.cost(metric, situation.mask)
        best: tuple[float, Group, int] | None = None
        for group in situation.groups:
            curve = curves[group.index]
            present = situation.width(group)
            costs = situation.costs.cost_curve(metric, group, situation.mask, situation.leaving(group))
            loss = max(curve[width] for width in curve if width >= present)
            for width in (width for width in curve if width < present):
                saved = now - costs[width]
                rate = (curve[width] - loss) / saved if saved > 1e-9 * now else np.inf
                if np.isfinite(rate) and (best is None or rate < best[0]):
                    best = (rate, group, width)
        return None if best is None else best[1:]

    @staticmethod
    def _narrow(situation: Situation, metric: str, group: Group, width: int) -> None:
        """Narrow a group to a width, or less if that already meets the target."""
        target = situation.targets[metric] + 1e-9 * situation.costs.baseline(metric)
        costs = situation.costs.cost_curve(metric, group, situation.mask, situation.leaving(group))
        enough = [one for one in situation.widths_below(group) if one >= width and costs[one] <= target]
        situation.mask = situation.without(situation.lowest(group, max(enough, default=width)))
