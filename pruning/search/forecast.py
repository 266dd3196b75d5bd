"""Looking ahead: what a search would do at every rewrite that is left, if training changed nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypedDict

from pruning.costs.budget import BudgetCourse
from pruning.search.greedy import GreedySearch
from pruning.search.search import Search, Situation


class ForecastRow(TypedDict):
    """One rewrite: its number, the training iteration, share of every cost and width of every group after it."""

    rewrite: int
    iteration: int
    costs: dict[str, float]
    widths: dict[str, int]


def forecast(
    search: Search, situation: Situation, course: BudgetCourse, rewrites: Iterable[int]
) -> list[ForecastRow]:
    """Meet one target of the schedule after the other, without rewriting.

    Args:
        search: Chooses; a greedy one trusts its estimate, as nothing is measured.
        situation: The network as it is. Its mask goes along.
        course: The targets.
        rewrites: Numbers of the rewrites that are left.

    Returns:
        A row per rewrite; the iteration is left at 0, for the caller to fill in.
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
