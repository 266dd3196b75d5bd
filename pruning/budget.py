"""Resource budgets: what share of which cost may remain, and the course of targets that leads there.

A rewrite removes about δ of the baseline cost (`--pruning_delta`), as in Kung & Hou (2020, Commun. Inf. Syst.
20(3)). The targets are laid out beforehand, rewrite i ends at `1 − (1 − share)·i/n`, so the number of rewrites n
is known before training, and what one rewrite overshoots the next one has less to do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from image_classification.config import ConfigError, check
from pruning.cost import METRICS, CostModel, nearest_metric


@dataclasses.dataclass(frozen=True)
class Budget:
    """Metric → share of the baseline that may remain, each in (0, 1).

    Raises:
        ConfigError: An unknown metric or a share out of range.
    """

    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        check(bool(self.shares), "--budget: give at least one, such as --budget macs=0.5")
        for metric, share in self.shares.items():
            check(metric in METRICS, f"--budget {metric}={share}: unknown cost{nearest_metric(metric)}")
            check(0 < share < 1, f"--budget {metric}={share}: the share that may remain is between 0 and 1")

    @classmethod
    def parse(cls, words: Sequence[str]) -> Budget:
        """Read `["macs=0.5", "latency=0.6"]`.

        Raises:
            ConfigError: A word is not METRIC=SHARE, or a metric comes twice.
        """
        shares: dict[str, float] = {}
        for word in words:
            metric, equals, value = word.partition("=")
            try:
                share = float(value)
            except ValueError:
                raise ConfigError(f"--budget {word!r}: write METRIC=SHARE, such as macs=0.5") from None
            check(bool(equals), f"--budget {word!r}: write METRIC=SHARE, such as macs=0.5")
            check(metric not in shares, f"--budget {metric} is given twice")
            shares[metric] = share
        return cls(shares)


class BudgetCourse:
    """The targets of a run's rewrites.

    Args:
        budget: Where the course ends.
        costs: Baseline and present cost.
        delta: Share of the baseline cost that one rewrite removes; 1 does everything in one.

    Attributes:
        num_rewrites: Rewrites from the baseline to the budget.
    """

    def __init__(self, budget: Budget, costs: CostModel, delta: float) -> None:
        check(0 < delta <= 1, f"--pruning_delta {delta}: a share of the baseline's cost in (0, 1] is needed")
        self.budget = budget
        self.costs = costs
        # Without the small tolerance 0.5/0.005 would be 100.00000000000001 rewrites in floating point.
        self.num_rewrites = max(math.ceil((1 - share) / delta - 1e-9) for share in budget.shares.values())

    def targets(self, rewrite: int) -> dict[str, float]:
        """Metric → largest cost allowed after the `rewrite`-th rewrite, counted from 1."""
        progress = min(rewrite / self.num_rewrites, 1.0)
        return {
            metric: self.costs.baseline(metric) * (1 - (1 - share) * progress)
            for metric, share in self.budget.shares.items()
        }

    def check_reachable(self) -> None:
        """Make sure that the budget can be met at all.

        Raises:
            ConfigError: Naming the metric, the lowest share that can be reached, and what holds it up.
        """
        for metric, share in self.budget.shares.items():
            try:
                self.costs.check_budget(metric, share)
            except ValueError as error:
                raise ConfigError(str(error)) from None


def as_budget(value: Budget | Mapping[str, float] | float | Any) -> Budget:
    """A budget from what users write in Python: a mapping, or one number for MACs."""
    if isinstance(value, Budget):
        return value
    if isinstance(value, (int, float)):
        return Budget({"macs": float(value)})
    if isinstance(value, Mapping):
        return Budget({str(metric): float(share) for metric, share in value.items()})
    raise TypeError(f"a budget is a mapping such as {{'macs': 0.5}} or a share, not {type(value).__name__}")
