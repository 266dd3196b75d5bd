"""Networks made smaller without training: widths by sensitivity, then a repair, for one budget or several.

    for point in compress(model, example, images, budgets=[{"macs": 0.75}, {"macs": 0.5}]):
        point.model, point.costs, point.report

What is measured of the network as it is (scores, and the loss along every group's widths) serves all budgets. The loss
is how far the outputs are from the original's: labels are not needed.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.models.modes import inference
from image_classification.models.running import Outputs
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.criteria import Criterion
from pruning.criteria.reconstruction import Reconstruction
from pruning.criteria.scoring import score_groups
from pruning.engine.channel_graph import ChannelGraph, Constraints
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.repair.image_chunks import parted
from pruning.repair.local_repair import LocalRepair
from pruning.repair.repairing import RepairReport, RepairSettings, plan_repair
from pruning.search.loss_change import LossChange
from pruning.search.search import Situation
from pruning.search.sensitivity import SensitivitySearch
from pruning.task import Task, logits_of

_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Point:
    """A compressed network.

    Attributes:
        model: The network.
        graph: Its channel graph.
        budget: What was asked for.
        costs: Metric → (original, now).
        repair: What the repair did; None without one.
        seconds: Since the point before (the first includes all measurements).
    """

    model: nn.Module
    graph: ChannelGraph
    budget: Mapping[str, float]
    costs: dict[str, tuple[float, float]]
    repair: RepairReport | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """How a network is compressed.

    Attributes:
        criterion: Orders the channels of a group.
        search: Chooses the widths.
        repair: Heals the network.
        constraints: Rounding, least widths, modules to leave alone.
        announce: Gets a line of text as the work goes on.
    """

    criterion: Criterion = dataclasses.field(default_factory=Reconstruction)
    search: SensitivitySearch = dataclasses.field(default_factory=SensitivitySearch)
    repair: RepairSettings = dataclasses.field(default_factory=RepairSettings)
    constraints: Constraints = dataclasses.field(default_factory=Constraints)
    announce: Callable[[str], None] = lambda text: None


def compress(
    model: nn.Module,
    images: Tensor,
    budgets: Sequence[Mapping[str, float]],
    settings: CompressSettings | None = None,
) -> Iterator[Point]:
    """Compress a network to one budget after the other, always from the original.

    Args:
        model: The trained network; it is left as it was.
        images: (N, …) calibration images on its device.
        budgets: Metric → share of the cost that may remain.
        settings: How.

    Yields:
        A point per budget, in their order.

    Raises:
        SettingError: A budget that cannot be reached, or images that cannot repair.
    """
    settings = settings or CompressSettings()
    begin = time.perf_counter()
    graph = trace_groups(model, images[:2], constraints=settings.constraints)
    metrics = tuple(dict.fromkeys(["macs", "params", *(name for budget in budgets for name in budget)]))
    costs = CostModel(graph, model, images[:1], metrics)
    for budget in budgets:
        for metric, share in Budget(dict(budget)).shares.items():
            costs.check_budget(metric, share)
    settings.announce(
        f"{len(graph.prunable)} of {len(graph.groups)} channel groups can be pruned; ordering their channels"
    )
    batches = _batches(model, images)
    task = Task(loss=divergence)
    scores = score_groups(model, graph, batches, settings.criterion, task=task)
    repaired = settings.repair.method == "least-squares"
    parts = parted(batches, settings.repair.held_out, task)
    fitted = [part.batch for part in parts if not part.held_out]
    judging = [part.batch for part in parts if part.held_out] or fitted
    local = LocalRepair(model, graph, fitted, task=task) if repaired else None
    judge = LossChange(model, graph, judging, task=task, repair=local)
    plain = {index: values.numpy() for index, values in scores.items()}
    settings.announce(f"measuring each group at {len(settings.search.shares)} widths")
    curves = settings.search.curves(Situation(graph, costs, plain, {}, judge))
    for budget in budgets:
        targets = {metric: share * costs.baseline(metric) for metric, share in budget.items()}
        settings.announce(f"cutting and repairing to {', '.join(f'{m}={s:g}' for m, s in budget.items())}")
        keep = settings.search.choose_along(Situation(graph, costs, plain, targets, judge), curves)
        yield _point(model, graph, keep, budget, metrics, images, batches, task, settings, begin)
        begin = time.perf_counter()


def _point(
    model: nn.Module,
    graph: ChannelGraph,
    keep: dict[int, np.ndarray],
    budget: Mapping[str, float],
    metrics: Sequence[str],
    images: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    task: Task,
    settings: CompressSettings,
    begin: float,
) -> Point:
    """Cut a copy and repair it."""
    small, its_graph = copy.deepcopy(model), copy.deepcopy(graph)
    costs = CostModel(its_graph, small, images[:1], metrics)
    plan = plan_repair(small, its_graph, its_graph.keep_mask(keep), settings.repair)
    prune_channels(small, its_graph, keep)
    costs.refresh()
    report = None if settings.repair.method == "none" else plan.repair(small, batches, task=task)
    reached = {metric: (costs.baseline(metric), costs.current(metric)) for metric in metrics}
    return Point(small, its_graph, budget, reached, report, time.perf_counter() - begin)


def divergence(outputs: Outputs, batch: tuple[Tensor, Tensor]) -> Tensor:
    """(N,) how far outputs are from the original's: Kullback-Leibler for logits (N, C), else mean squares.

    Args:
        outputs: Of the network; of several, the main ones count.
        batch: (images, outputs of the original network).

    Raises:
        SettingError: There is no main output.
    """
    found, expected = logits_of(outputs), batch[1]
    if found.dim() == 2 and found.shape[1] > 1:
        terms = F.kl_div(found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="none")
        return terms.sum(1)
    return (found - expected).square().flatten(1).mean(1)


def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """The main outputs for all images, a few at a time."""
    with inference(model):
        return torch.cat([logits_of(model(chunk)) for chunk in images.split(_CHUNK)])


def _batches(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    expected = outputs_of(model, images)
    return list(zip(images.split(_CHUNK), expected.split(_CHUNK), strict=True))
