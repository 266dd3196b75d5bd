"""Notebook views of a pruner: a table, and a plot of its progress."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from image_classification.extras import optional_import
from image_classification.observe.html_table import html_table, share_words
from pruning.costs.cost_model import CostModel
from pruning.engine.channel_graph import ChannelGraph
from pruning.rewrites.rewrite_record import RewriteRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME_LENGTH = 28


def course_html(
    title: str, costs: CostModel, budget: Mapping[str, float], history: Sequence[RewriteRecord]
) -> str:
    """Return a pruner's table for notebooks: costs beside the budget, then a row per rewrite.

    Args:
        title: Title: the pruned network and the progress.
        costs: Current costs of the network.
        budget: Metric → share that may remain.
        history: The rewrites so far.
    """
    rows = []
    for metric, share in budget.items():
        now = costs.current(metric)
        first = costs.baseline(metric)
        rows.append((metric, now, first, share_words(now, first), share_words(share, 1)))
    head = html_table(title, ("metric", "now", "at first", "share", "budget"), rows)
    if not history:
        return head
    done = [(record.rewrite, _when(record), _costs(record), _losses(record)) for record in history]
    return head + html_table("Rewrites", ("rewrite", "iteration", "cost", "calibration loss"), done)


def _when(record: RewriteRecord) -> int | None:
    return record.iteration if record.iteration >= 0 else None


def _costs(record: RewriteRecord) -> str:
    return ", ".join(
        f"{metric} {share_words(after, base)}" for metric, (_, after, base) in record.costs.items()
    )


def _losses(record: RewriteRecord) -> str | None:
    known = [loss for loss in record.loss if not math.isnan(loss)]
    return " → ".join(f"{loss:.4f}" for loss in known) or None


def plot_course(
    graph: ChannelGraph,
    budget: Mapping[str, float],
    history: Sequence[RewriteRecord],
    axes: Sequence[Axes] | None,
) -> list[Axes]:
    """Plot costs over rewrites, and the width of every group that may shrink beside its original width.

    Args:
        graph: The network's current groups.
        budget: Metric → share that may remain, drawn as dotted lines.
        history: The rewrites so far.
        axes: Two matplotlib axes to draw on; None creates a figure.

    Returns:
        The two axes.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    if axes is None:
        with optional_import():
            from matplotlib import pyplot

        height = 2.6 + 0.18 * len(graph.prunable)
        _, made = pyplot.subplots(
            2, 1, figsize=(7, height), height_ratios=[2.2, height - 2.6], layout="constrained"
        )
        axes = list(made)
    costs, widths = axes
    _plot_costs(costs, budget, history)
    _plot_widths(widths, graph)
    return [costs, widths]


def _plot_costs(axes: Axes, budget: Mapping[str, float], history: Sequence[RewriteRecord]) -> None:
    numbers = [0, *(record.rewrite for record in history)]
    for number, (metric, share) in enumerate(budget.items()):
        shares = [100.0, *(100 * record.costs[metric][1] / record.costs[metric][2] for record in history)]
        axes.plot(numbers, shares, marker="o", markersize=3, color=f"C{number}", label=metric)
        axes.axhline(100 * share, linestyle=":", color=f"C{number}")
    axes.set(xlabel="rewrites", ylabel="% of the original", ylim=(0, 105), title="Cost (dotted: budget)")
    axes.set_xticks(numbers[:: 1 + len(numbers) // 12])
    axes.legend()


def _plot_widths(axes: Axes, graph: ChannelGraph) -> None:
    groups = graph.prunable[::-1]
    names = [_shortened(group.name) for group in groups]
    positions = range(len(groups))
    axes.barh(positions, [group.original_width for group in groups], 0.8, color="0.85", label="at first")
    axes.barh(positions, [group.width for group in groups], 0.8, color="C0", label="now")
    axes.set_yticks(positions, names, fontsize=7)
    axes.set(xlabel="channels that may leave one by one", title="Widths")
    axes.legend()


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"
