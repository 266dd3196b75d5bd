"""Checks that a budget is met: an unreachable one is refused before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from image_classification.config import SettingError, check_setting
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.search.search import Situation

_TINY = 1e-6


def check_scored(situation: Situation, budget: Budget) -> None:
    """Check that the groups with scores suffice for the budget.

    Raises:
        SettingError: They do not; the message names the groups without scores.
    """
    graph, costs = situation.graph, situation.costs
    unscored = [group.name for group in graph.prunable if group.index not in situation.scores]
    if not unscored:
        return
    mask = situation.mask.copy()
    for group in situation.groups:
        mask[situation.lowest(group, graph.allowed_widths(group)[0])] = False
    for metric, share in budget.shares.items():
        least = costs.cost(metric, mask) / costs.baseline(metric)
        check_setting(
            least <= share * (1 + _TINY),
            "budget",
            f"{metric}={share}",
            f"the criterion cannot score {', '.join(unscored)}, and the other groups get down to {least:.3f} of the "
            "baseline: take another criterion, or raise the share",
        )


def check_met(situation: Situation, keep: Mapping[int, np.ndarray], budget: Budget) -> None:
    """Check that a cut ends within the budget.

    Raises:
        SettingError: The search leaves more than the budget.
    """
    mask = situation.graph.keep_mask(keep)
    costs = {metric: situation.costs.cost(metric, mask) for metric in budget.shares}
    for metric, left in above_budget(situation.costs, costs, budget).items():
        raise missed(metric, left, budget)


def above_budget(model: CostModel, costs: Mapping[str, float], budget: Budget) -> dict[str, float]:
    """Return metric → share of the baseline, for costs above the budget."""
    left = {metric: cost / model.baseline(metric) for metric, cost in costs.items()}
    return {metric: share for metric, share in left.items() if share > budget.shares[metric] * (1 + _TINY)}


def missed(metric: str, left: float, budget: Budget) -> SettingError:
    """Build the error for a budget that the last rewrite does not meet."""
    return SettingError(
        "budget",
        f"{metric}={budget.shares[metric]}",
        f"the search leaves {left:.3f} of the baseline at the last rewrite: take another search, raise the share, or "
        "loosen the constraints",
    )
