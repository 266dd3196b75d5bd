"""Forecast of a search: its choice at every remaining rewrite, if training changed nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypedDict

from pruning.costs.budget import BudgetCourse
from pruning.search.greedy import GreedySearch
from pruning.search.search import Search, Situation


class ForecastRow(TypedDict):
    """A forecast rewrite: its number, the training iteration, and the share of every cost and width of every group
    after it.
    """

    rewrite: int
    iteration: int
    costs: dict[str, float]
    widths: dict[str, int]


def forecast(
    search: Search, situation: Situation, course: BudgetCourse, rewrites: Iterable[int]
) -> list[ForecastRow]:
    """Meet the targets of the schedule one after the other, without rewriting.

    Args:
        search: The search; a greedy one trusts its estimate, since nothing is measured.
        situation: Situation of the current network. Its mask is updated.
        course: The targets.
        rewrites: Numbers of the remaining rewrites.

    Returns:
        A row per rewrite; the iteration is 0 and must be set by the caller.
    """
    if isinstance(search, GreedySearch):
        search = dataclasses.replace(search, shortlist=1)
    costs = situation.costs
    rows = []
    for rewrite in rewrites:
        situation.targets = course.targets(rewrite)
        search.choose(situation)
        shares = {
            metric: costs.cost(metric, situation.mask) / costs.baseline(metric)
            for metric in course.budget.shares
        }
        widths = {group.name: situation.width(group) for group in situation.groups}
        rows.append(ForecastRow(rewrite=rewrite, iteration=0, costs=shares, widths=widths))
    return rows
