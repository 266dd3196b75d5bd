"""Resource budgets: what share of which cost may remain, and the schedule of targets that leads there.

A rewrite removes about δ (`delta`) of the baseline cost, as in Kung & Hou (2020, Commun. Inf. Syst. 20(3)). The
targets are laid out beforehand: rewrite i of n ends at `1 − (1 − share)·i/n`. So n is known before training, and what
one rewrite removes in excess the next one need not remove.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from image_classification.config import SettingError, check_setting
from pruning.costs.cost_model import CostModel
from pruning.costs.cost_registry import cost_named

#: Share of the MACs that remains where no budget is given, and share of the baseline that one rewrite removes.
DEFAULT_SHARE = 0.5
DEFAULT_DELTA = 5e-3


@dataclasses.dataclass(frozen=True)
class Budget:
    """Metric → share of the baseline that may remain, each in (0, 1).

    Raises:
        SettingError: An unknown metric or a share out of range.
    """

    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        check_setting(bool(self.shares), "budget", {}, "give at least one metric, such as macs=0.5")
        for metric, share in self.shares.items():
            cost_named(metric, "budget")
            check_setting(
                0 < share < 1, "budget", f"{metric}={share}", "the share that may remain is between 0 and 1"
            )

    @classmethod
    def parse(cls, words: Sequence[str]) -> Budget:
        """Read `["macs=0.5", "latency=0.6"]`.

        Raises:
            SettingError: A word is not METRIC=SHARE, or a metric comes twice.
        """
        shares: dict[str, float] = {}
        for word in words:
            metric, _, value = word.partition("=")
            try:
                share = float(value)
            except ValueError:
                raise SettingError("budget", word, "write METRIC=SHARE, such as macs=0.5") from None
            check_setting(metric not in shares, "budget", metric, "is given twice")
            shares[metric] = share
        return cls(shares)


class BudgetCourse:
    """The targets of a run's rewrites.

    Args:
        budget: Where the schedule ends.
        costs: Baseline and present cost.
        delta: Share of the baseline cost that one rewrite removes; 1 does everything in one.

    Attributes:
        num_rewrites: Rewrites from the baseline to the budget.
    """

    def __init__(self, budget: Budget, costs: CostModel, delta: float) -> None:
        check_setting(0 < delta <= 1, "delta", delta, "a share of the baseline's cost in (0, 1] is needed")
        self.budget = budget
        self.costs = costs
        self.delta = delta
        # Without the small tolerance 0.5/0.005 would be 100.00000000000001 rewrites in floating point.
        self.num_rewrites = max(math.ceil((1 - share) / delta - 1e-9) for share in budget.shares.values())

    def targets(self, rewrite: int) -> dict[str, float]:
        """Metric → largest cost allowed after the `rewrite`-th rewrite, counted from 1."""
        progress = min(rewrite / self.num_rewrites, 1.0)
        return {
            metric: self.costs.baseline(metric) * (1 - (1 - share) * progress)
            for metric, share in self.budget.shares.items()
        }

    def certainly_missed(self, rewrites: int, together: bool = False) -> bool:
        """Whether so many rewrites from the baseline end above the budget, by counting alone.

        A search that takes step after step ends a step below its targets at most: this much is granted for the
        metric that it went by last, whichever that was.

        Args:
            rewrites: Their number.
            together: The search takes a step of all groups at a time.
        """
        targets = self.targets(rewrites)
        for metric, share in self.budget.shares.items():
            step = self.costs.largest_step(metric, together)
            if step is None or targets[metric] - step <= share * self.costs.baseline(metric):
                return False
        return True

    def check_reachable(self) -> None:
        """Make sure that the budget can be met at all.

        Raises:
            SettingError: Naming the metric, the lowest share that can be reached, and what holds it up.
        """
        for metric, share in self.budget.shares.items():
            self.costs.check_budget(metric, share)


def as_budget(value: Budget | Mapping[str, float] | float) -> Budget:
    """A budget from what users write in Python: a mapping, or one number for MACs.

    Raises:
        TypeError: Neither of them.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, (int, float)):
        return Budget({"macs": float(value)})
    if isinstance(value, Mapping):
        return Budget({str(metric): float(share) for metric, share in value.items()})
    raise TypeError(f"a budget is a mapping such as {{'macs': 0.5}} or a share, not {type(value).__name__}")
