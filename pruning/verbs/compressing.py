"""Compression of networks without training: widths by sensitivity, then a repair, for one budget or several.

    for point in compress(model, images, budgets=[{"macs": 0.75}, {"macs": 0.5}]):
        point.model, point.costs, point.repair

    graph, curves = sensitivity(model, images)

Measurements of the original network (scores, and the loss along every group's widths) serve all budgets. The loss is
the divergence of the outputs from the original's, so labels are not needed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
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
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.constraints import Constraints
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.repair.image_chunks import parted
from pruning.repair.local_repair import LocalRepair
from pruning.repair.repairing import RepairReport, RepairSettings, plan_repair
from pruning.search.loss_change import LossChange
from pruning.search.search import Situation
from pruning.search.sensitivity import Curves, SensitivitySearch
from pruning.task import Task, logits_of

_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Point:
    """A compressed network.

    Attributes:
        model: The network.
        graph: Its channel graph.
        budget: The requested budget.
        costs: Metric → (original, current).
        repair: Report of the repair; None without one.
        seconds: Seconds since the previous point (the first includes all measurements).
    """

    model: nn.Module
    graph: ChannelGraph
    budget: Mapping[str, float]
    costs: dict[str, tuple[float, float]]
    repair: RepairReport | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """Settings of a compression.

    Attributes:
        criterion: Criterion that orders the channels of a group.
        search: Search that chooses the widths.
        repair: How the network is repaired.
        constraints: Rounding, smallest widths, modules to leave alone.
        announce: Called with lines of text on the progress.
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
    """Compress a network to each budget in turn, always starting from the original.

    Args:
        model: The trained network; it is not modified.
        images: (N, …) calibration images on its device.
        budgets: Metric → share of the cost that may remain.
        settings: Settings of the compression.

    Yields:
        A point per budget, in their order.

    Raises:
        SettingError: A budget cannot be reached, or the images cannot be used for the repair.
    """
    settings = settings or CompressSettings()
    begin = time.perf_counter()
    metrics = tuple(dict.fromkeys(["macs", "params", *(name for budget in budgets for name in budget)]))
    subject = _Subject(model, images, metrics, settings)
    for budget in budgets:
        for metric, share in Budget(dict(budget)).shares.items():
            subject.costs.check_budget(metric, share)
    curves = subject.curves()
    for budget in budgets:
        settings.announce(f"cutting and repairing to {', '.join(f'{m}={s:g}' for m, s in budget.items())}")
        keep = settings.search.choose_along(subject.situation(budget), curves)
        yield subject.point(keep, budget, begin)
        begin = time.perf_counter()


def sensitivity(
    model: nn.Module, images: Tensor, settings: CompressSettings | None = None
) -> tuple[ChannelGraph, Curves]:
    """Measure how far the outputs move when each group alone is narrowed; nothing is cut.

    Args:
        model: The trained network; it is not modified.
        images: (N, …) calibration images on its device.
        settings: Settings; the search determines the widths.

    Returns:
        The network's channel groups, and the measurements of each.
    """
    subject = _Subject(model, images, ("macs",), settings or CompressSettings())
    return subject.graph, subject.curves()


class _Subject:
    """A network with its calibration images, and the measurements that serve all budgets."""

    def __init__(
        self, model: nn.Module, images: Tensor, metrics: Sequence[str], settings: CompressSettings
    ) -> None:
        self.model = model
        self.images = images
        self.metrics = metrics
        self.settings = settings
        self.graph = trace_groups(model, images[:2], constraints=settings.constraints)
        self.costs = CostModel(self.graph, model, images[:1], metrics)
        self.task = Task(loss=divergence)
        self._batches = _batches(model, images)

    def curves(self) -> Curves:
        """Order the channels of every group, and measure the loss along its widths."""
        situation = self.situation({})
        self.settings.announce(f"measuring each group at {len(self.settings.search.shares)} widths")
        return self.settings.search.curves(situation)

    def situation(self, budget: Mapping[str, float]) -> Situation:
        """Return the situation of the original network with a budget as its target."""
        targets = {metric: share * self.costs.baseline(metric) for metric, share in budget.items()}
        return Situation(self.graph, self.costs, self._scores, targets, self._judge)

    @functools.cached_property
    def _scores(self) -> dict[int, np.ndarray]:
        graph, settings = self.graph, self.settings
        settings.announce(
            f"{len(graph.prunable)} of {len(graph.groups)} channel groups can be pruned; ordering their channels"
        )
        scores = score_groups(self.model, graph, self._batches, settings.criterion, task=self.task)
        return {index: values.numpy() for index, values in scores.items()}

    @functools.cached_property
    def _judge(self) -> LossChange:
        """Create the measure on images that no repair is fitted to."""
        repair = self.settings.repair
        parts = parted(self._batches, repair.held_out, self.task)
        fitted = [part.batch for part in parts if not part.held_out]
        judging = [part.batch for part in parts if part.held_out] or fitted
        local = None
        if repair.method == "least-squares":
            local = LocalRepair(self.model, self.graph, fitted, task=self.task)
        return LossChange(self.model, self.graph, judging, task=self.task, repair=local)

    def point(self, keep: dict[int, np.ndarray], budget: Mapping[str, float], begin: float) -> Point:
        """Cut and repair a copy."""
        settings = self.settings
        small, graph = copy.deepcopy(self.model), copy.deepcopy(self.graph)
        costs = CostModel(graph, small, self.images[:1], self.metrics)
        plan = plan_repair(small, graph, graph.keep_mask(keep), settings.repair)
        prune_channels(small, graph, keep)
        costs.refresh()
        report = None
        if settings.repair.method != "none":
            report = plan.repair(small, self._batches, task=self.task)
        reached = {metric: (costs.baseline(metric), costs.current(metric)) for metric in self.metrics}
        return Point(small, graph, budget, reached, report, time.perf_counter() - begin)


def divergence(outputs: Outputs, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the divergence of outputs from the original's, (N,): Kullback-Leibler for logits (N, C), else mean
    squares.

    Args:
        outputs: Outputs of the network; of several, the main ones are used.
        batch: (images, outputs of the original network).

    Raises:
        SettingError: There is no main output.
    """
    found = logits_of(outputs)
    expected = batch[1]
    if found.dim() == 2 and found.shape[1] > 1:
        terms = F.kl_div(found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="none")
        return terms.sum(1)
    return (found - expected).square().flatten(1).mean(1)


def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the main outputs for all images, computed a few at a time."""
    with inference(model):
        return torch.cat([logits_of(model(chunk)) for chunk in images.split(_CHUNK)])


def _batches(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    expected = outputs_of(model, images)
    return list(zip(images.split(_CHUNK), expected.split(_CHUNK), strict=True))
