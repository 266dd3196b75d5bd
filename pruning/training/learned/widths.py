"""Conversion of learned gates to widths that meet the budget exactly.

The resource loss is soft and hard gates are discrete, so at the end of learning the cost lies near the budget, not on
it; widths must also respect the constraints. A single threshold τ on all gates' logits decides: a group keeps its most
probable channels, as many as have a logit ≥ τ (up to an allowed width). τ = 0 is the gates' own decision; the τ taken
is the lowest at which every budget is met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group


@dataclasses.dataclass(frozen=True)
class GateCut:
    """The decision of the gates, and the resulting cut.

    Attributes:
        keep: Group index → positions that stay, ascending; groups that lose nothing are left out.
        threshold: τ.
        gates_share: Metric → share of the original cost that the gates themselves keep (τ = 0, before any width is
            adjusted).
        share: The same for the cut.
        num_closed: Number of removed channels that the gates would have kept.
        num_opened: Number of kept channels that the gates would have removed.
    """

    keep: dict[int, np.ndarray]
    threshold: float
    gates_share: dict[str, float]
    share: dict[str, float]
    num_closed: int
    num_opened: int

    def describe(self) -> str:
        """Return a one-line description."""
        own = ", ".join(f"{metric} {100 * share:.1f} %" for metric, share in self.gates_share.items())
        end = ", ".join(f"{metric} {100 * share:.1f} %" for metric, share in self.share.items())
        if not self.num_closed and not self.num_opened:
            return f"the gates keep {own} of the original: taken as they are"
        return (
            f"the gates keep {own} of the original, which is not the budget; by their probabilities "
            f"{self.num_closed} more channels go and {self.num_opened} stay after all: {end}"
        )


def widths_of_gates(
    graph: ChannelGraph,
    groups: Sequence[Group],
    costs: CostModel,
    budget: Budget,
    logits: Mapping[int, np.ndarray],
) -> GateCut:
    """Choose the channels to keep.

    Args:
        graph, costs: Graph and costs of the current network.
        groups: The groups that have gates.
        budget: What may remain; it can be reached (`BudgetCourse.check_reachable`).
        logits: Group index → (width,) logits θ + base of its gates.
    """
    thresholds = np.append(np.unique(np.concatenate([logits[group.index] for group in groups])), np.inf)

    def meets(mask: np.ndarray) -> bool:
        return all(
            costs.cost(metric, mask) <= (share + 1e-9) * costs.baseline(metric)
            for metric, share in budget.shares.items()
        )

    # Find the lowest threshold that meets the budget by bisection: masks shrink as τ grows, and costs with them.
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if meets(mask_at(graph, groups, logits, thresholds[middle])):
            high = middle
        else:
            low = middle + 1
    mask = mask_at(graph, groups, logits, thresholds[low])

    # For comparison, the cost of the gates' own decision: τ = 0, at any width.
    own = np.ones(graph.num_units, dtype=bool)
    for group in groups:
        own[group.units] = logits[group.index] >= 0
    keep = {group.index: np.flatnonzero(mask[group.units]) for group in groups if not mask[group.units].all()}
    return GateCut(
        keep=keep,
        threshold=float(thresholds[low]),
        gates_share=_shares(costs, budget, own),
        share=_shares(costs, budget, mask),
        num_closed=int((own & ~mask).sum()),
        num_opened=int((mask & ~own).sum()),
    )


def _shares(costs: CostModel, budget: Budget, mask: np.ndarray) -> dict[str, float]:
    return {metric: costs.cost(metric, mask) / costs.baseline(metric) for metric in budget.shares}


def mask_at(
    graph: ChannelGraph, groups: Sequence[Group], logits: Mapping[int, np.ndarray], threshold: float
) -> np.ndarray:
    """Return the units to keep at a threshold, (num_units,) bool; widths are allowed ones."""
    mask = np.ones(graph.num_units, dtype=bool)
    for group in groups:
        values = logits[group.index]
        allowed = np.array(graph.allowed_widths(group))
        fitting = allowed[allowed <= (values >= threshold).sum()]
        width = fitting[-1] if len(fitting) else allowed[0]
        # A stable sort makes ties, and with them the choice, the same on every machine.
        mask[group.units[np.argsort(values, kind="stable")[: len(values) - width]]] = False
    return mask


def inner_groups(graph: ChannelGraph) -> list[Group]:
    """Return prunable groups whose channels are produced by a single layer (not counting depthwise layers that pass
    them on).

    In residual networks these are the channels within blocks, where the published gates are; channels of the residual
    sums are produced by several layers.
    """
    return [group for group in graph.prunable if len(_makers(graph, group)) <= 1]


def _makers(graph: ChannelGraph, group: Group) -> set[str]:
    """Return the layers that produce a group's channels from others."""
    makers = set()
    for layer in graph.layers_of(group):
        makes = layer.produced is not None and group.index in graph.groups_in(layer.produced)
        passes_on = layer.consumed is not None and group.index in graph.groups_in(layer.consumed)
        if makes and not passes_on:
            makers.add(layer.module)
    return makers
