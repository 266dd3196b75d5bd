"""Resource budgets: the share of each cost that may remain, and the schedule of targets that leads there.

A rewrite removes about δ (`delta`) of the baseline cost, as in Kung & Hou (2020, Commun. Inf. Syst. 20(3)). The targets
are fixed in advance: rewrite i of n ends at `1 − (1 − share)·i/n`. So n is known before training, and if one rewrite
removes more than its share, the next one removes less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from image_classification.config import SettingError, check_setting
from pruning.costs.cost_model import CostModel
from pruning.costs.cost_registry import cost_named

#: Default share of the MACs that remains, and share of the baseline that one rewrite removes.
DEFAULT_SHARE = 0.5
DEFAULT_DELTA = 5e-3


@dataclasses.dataclass(frozen=True)
class Budget:
    """Metric → share of the baseline that may remain, each in (0, 1).

    Raises:
        SettingError: A metric is unknown or a share out of range.
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
        """Parse words such as `["macs=0.5", "latency=0.6"]`.

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
        budget: The budget at the end of the schedule.
        costs: Model of the baseline and current costs.
        delta: Share of the baseline cost that one rewrite removes; 1 removes everything in a single rewrite.

    Attributes:
        num_rewrites: Rewrites from the baseline to the budget.
    """

    def __init__(self, budget: Budget, costs: CostModel, delta: float) -> None:
        check_setting(0 < delta <= 1, "delta", delta, "a share of the baseline's cost in (0, 1] is needed")
        self.budget = budget
        self.costs = costs
        self.delta = delta
        # Without this tolerance, 0.5/0.005 would be 100.00000000000001 rewrites in floating point.
        self.num_rewrites = max(math.ceil((1 - share) / delta - 1e-9) for share in budget.shares.values())

    def targets(self, rewrite: int) -> dict[str, float]:
        """Return metric → largest cost allowed after the `rewrite`-th rewrite, counted from 1."""
        progress = min(rewrite / self.num_rewrites, 1.0)
        return {
            metric: self.costs.baseline(metric) * (1 - (1 - share) * progress)
            for metric, share in self.budget.shares.items()
        }

    def certainly_missed(self, rewrites: int, together: bool = False) -> bool:
        """Whether this number of rewrites from the baseline is certain to end above the budget.

        A stepwise search ends at most one step below its targets. That much is allowed for the metric it last followed,
        whichever that was.

        Args:
            rewrites: Number of rewrites.
            together: The search narrows all groups at each step.
        """
        targets = self.targets(rewrites)
        for metric, share in self.budget.shares.items():
            step = self.costs.largest_step(metric, together)
            if step is None or targets[metric] - step <= share * self.costs.baseline(metric):
                return False
        return True

    def check_reachable(self) -> None:
        """Check that the budget can be met at all.

        Raises:
            SettingError: The budget cannot be met; the message names the metric, the lowest reachable share and the
                limiting factor.
        """
        for metric, share in self.budget.shares.items():
            self.costs.check_budget(metric, share)


def as_budget(value: Budget | Mapping[str, float] | float) -> Budget:
    """Convert a mapping, or one number for MACs, to a budget.

    Raises:
        TypeError: The value is neither.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, (int, float)):
        return Budget({"macs": float(value)})
    if isinstance(value, Mapping):
        for metric, share in value.items():
            number = isinstance(share, (int, float))
            check_setting(
                number, "budget", f"{metric}={share!r}", "give a share that may remain, such as 0.5"
            )
        return Budget({str(metric): float(share) for metric, share in value.items()})
    raise TypeError(f"a budget is a mapping such as {{'macs': 0.5}} or a share, not {type(value).__name__}")
