"""Costs of a network at any widths, computed without running it.

    costs = CostModel(graph, model, images, metrics=("macs", "latency"))
    costs.cost("macs", mask)                      # of a keep vector; differentiable for a tensor of gates
    costs.cost_curve("macs", group)               # at every width 0 … w of one group

`built_in.py` lists the costs, `register_cost` adds others. A mask over thousands of units shrinks to a few dozen counts
(`counts.py`). Every cost is a closed form of these, so an evaluation takes well under a millisecond, and all widths of
a group are evaluated at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, overload

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.config import SettingError, check_setting
from image_classification.observe.html_table import html_table, share_words
from pruning.costs.activations import Activations
from pruning.costs.cost_registry import CostInputs, cost_named
from pruning.costs.counts import CountTable, Metric
from pruning.costs.latency_measure import measure_latency
from pruning.costs.latency_table import LatencyError, LatencySettings, LatencyTable
from pruning.costs.product_costs import Products
from pruning.engine.channel_graph import ChannelGraph, GroupKey
from pruning.engine.examples import Example

#: Relative tolerance in comparisons of costs.
_TINY = 1e-9


class CostState(TypedDict):
    """State of a cost model in a checkpoint: plain data.

    Attributes:
        baseline: Metric → cost before any rewrite.
        latency: The latency table, if there is one.
        latency_digest: Its digest.
    """

    baseline: dict[str, float]
    latency: dict[str, Any] | None
    latency_digest: str | None


class CostModel:
    """Costs of a network as functions of a keep vector over its graph's units.

    Args:
        graph: The network's channel graph; it may shrink as the network is rewritten (`refresh`).
        model: The bare network. It is run once or twice on the example for "memory" and "latency".
        example: (N, 3, H, W) float, or the network's arguments. Costs refer to this size.
        metrics: Some of `cost_names()`.
        latency: How to measure; the batch size defaults to that of the example.
        latency_table: A table to use instead of measuring (rank 0's; `LatencyTable.from_plain`).
        state: An earlier `state_dict()`: baseline and table are taken from it, and nothing is measured.
        announce: Called with lines of text on the progress of measuring; by default they are logged.

    Raises:
        ValueError: A metric is unknown, or the table does not fit the network.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        example: Tensor | tuple[object, ...] | Example,
        metrics: Sequence[str] = ("macs",),
        *,
        latency: LatencySettings | None = None,
        latency_table: LatencyTable | None = None,
        state: CostState | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.graph = graph
        self.metrics = tuple(dict.fromkeys(metrics))
        self._model = model
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if not isinstance(example, Example):
            example = Example(example if isinstance(example, tuple) else (example,))
        self._example = example.map(lambda tensor: tensor.to(device))
        self._settings = latency or LatencySettings()
        self._announce = announce
        self.latency_table = latency_table
        known = None if state is None else state.get("latency")
        if known is not None:
            self.latency_table = LatencyTable.from_plain(known)
        self._build()
        self._baseline = {name: self.current(name) for name in self.metrics}
        if state is not None:
            self.load_state_dict(state)

    # -- construction --------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Build everything that depends on the graph's units."""
        self._table = CountTable()
        network = CostInputs(self.graph, self._model, self._example, self._table, self._known_latencies)
        costs = [cost_named(name) for name in self.metrics]
        self._metrics = {cost.name: cost.build(network) for cost in costs}
        self._table.settle(self.graph)
        self._parts: dict[tuple[str, int], Metric | None] = {}
        self._allowed: dict[int, np.ndarray] = {}

    def _known_latencies(self, activations: Activations) -> LatencyTable:
        """Return the latency table, measuring it if it is unknown."""
        if self.latency_table is None:
            self.latency_table = measure_latency(
                self._model, self.graph, self._example, activations, self._settings, self._announce
            )
        return self.latency_table

    def refresh(self) -> None:
        """Update the costs after a rewrite of the network (`prune_channels`). The baseline stays."""
        if self._table.follow(self.graph):
            self._allowed.clear()
        else:
            self._build()

    # -- queries ------------------------------------------------------------------------------------------

    @overload
    def cost(self, metric: str, mask: Tensor) -> Tensor: ...
    @overload
    def cost(self, metric: str, mask: np.ndarray | None = None) -> float: ...
    def cost(self, metric: str, mask: np.ndarray | Tensor | None = None) -> float | Tensor:
        """Return the cost of the network under a mask.

        Args:
            metric: One of the model's metrics.
            mask: (num_units,) bool or float in [0, 1]; None keeps everything present now.

        Returns:
            A float; for a tensor a scalar float64 tensor on its device, differentiable in the mask.
        """
        function = self._metric(metric)
        if mask is not None and tuple(mask.shape) != (self.graph.num_units,):
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}; the graph has {self.graph.num_units} units (a mask from "
                "before a rewrite does not fit after it)"
            )
        value = function.evaluate(self._table.counts(self._table.kept_per_class(mask)))
        return value if isinstance(mask, Tensor) else float(value)

    def current(self, metric: str) -> float:
        """Return the cost at the current widths."""
        return self.cost(metric)

    def baseline(self, metric: str) -> float:
        """Return the cost when the model was created (or the baseline of the loaded state)."""
        self._metric(metric)
        return self._baseline[metric]

    def share(self, metric: str) -> float:
        """Return the remaining share of the baseline cost."""
        return self.current(metric) / self.baseline(metric)

    def report(self) -> dict[str, float]:
        """Return every metric at the current widths."""
        return {name: self.current(name) for name in self.metrics}

    def _repr_html_(self) -> str:
        """Return a notebook's view: every metric now, its baseline, and their ratio."""
        rows = [
            (
                name,
                self.current(name),
                self.baseline(name),
                share_words(self.current(name), self.baseline(name)),
            )
            for name in self.metrics
        ]
        return html_table("Costs", ("metric", "now", "at first", "share"), rows)

    def minimum(self, metric: str) -> float:
        """Return the cost with every group at its smallest allowed width (if units differ, a group's first ones
        stay).
        """
        mask = np.ones(self.graph.num_units, dtype=bool)
        for group in self.graph.prunable:
            mask[group.units[int(self._allowed_widths(group.index)[0]) :]] = False
        return self.cost(metric, mask)

    def largest_step(self, metric: str, together: bool = False) -> float | None:
        """Return the most that a group can save by going from one allowed width to the next, now or later.

        Args:
            metric: One of the model's metrics.
            together: All groups take a step at once, instead of one group.

        Returns:
            None if unknown: the cost is not a sum of products of counts, and may fall faster later.
        """
        if not isinstance(self._metric(metric), Products):
            return None
        steps = [self._step_saves(metric, group.index) for group in self.graph.prunable]
        return sum(steps) if together else max(steps)

    def _step_saves(self, metric: str, index: int) -> float:
        """Return the most that one group's widest step can save. In a narrower network a unit saves less, never
        more.
        """
        num_gone = int(np.diff(self._allowed_widths(index)).max(initial=0))
        _, left = self._less_one_unit(metric, index, None)
        return num_gone * float(self.current(metric) - left.min())

    def cost_curve(
        self,
        metric: str,
        group: GroupKey,
        mask: np.ndarray | None = None,
        order: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the cost at every width of one group, with everything else as in the mask.

        Args:
            metric: One of the model's metrics.
            group: The group.
            mask: (num_units,) bool; None for the present network.
            order: Positions of the group's kept units in the order they are removed. It only matters if units have
                different costs; then the default removes the units that save least first, so that the curve never
                underestimates the cost, whichever units go.

        Returns:
            (w + 1,) float64 for the w units kept now; entry k is the cost with k units left. Entry 0 is only a limit:
                no group may be emptied.
        """
        function = self._metric(metric)
        index = self.graph.group(group).index
        leaving = self._leaving_classes(metric, index, mask, order)
        width = len(leaving)

        # Row k of `table` holds the number of kept units per class with k units of the group left. By then the first
        # width − k entries of `leaving` are gone, each reducing its own class by one.
        kept = self._table.kept_per_class(mask)
        table = kept.expand(width + 1, -1).clone()
        num_gone = width - torch.arange(width + 1)
        for name in np.unique(leaving).tolist():
            of_class = np.concatenate([[0], np.cumsum(leaving == name)])
            table[:, name] -= torch.from_numpy(of_class).to(torch.float64)[num_gone]

        # If the cost is a sum, only the summands that involve the group are evaluated at every width; the others are
        # constant.
        part = self._part(metric, index)
        if part is None:
            return function.evaluate(self._table.counts(table)).numpy()
        own = part.evaluate(self._table.counts(table))
        total = function.evaluate(self._table.counts(kept))
        return (own + (total - own[-1])).numpy()

    def check_budget(self, metric: str, share: float) -> None:
        """Check that a budget can be met.

        Raises:
            SettingError: The metric is unknown, cannot change at all, or cannot be reduced to this share.
        """
        self._metric(metric)
        lowest = self.minimum(metric)
        present = self.current(metric)
        baseline = self.baseline(metric)
        constant = lowest >= present * (1 - _TINY)
        if constant and share * baseline < present:
            reasons = "; ".join(sorted(set(self.graph.frozen.values()))[:3])
            raise SettingError(
                "budget",
                f"{metric}={share}",
                f"{metric} does not depend on any width that may change ({len(self.graph.prunable)} groups can be "
                f"pruned; why others cannot: {reasons or 'there are none'}); `python -m pruning groups` lists them. "
                "Choose another cost, or loosen min_width or round_to",
            )
        check_setting(
            lowest <= share * baseline,
            "budget",
            f"{metric}={share}",
            f"cannot be reached: with every group at its smallest allowed width {lowest / baseline:.3f} of the "
            "baseline remains. Raise the share, or loosen min_width, round_to or ignored",
        )

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> CostState:
        """Return baseline and latency table as plain data (JSON-able)."""
        table = self.latency_table
        return {
            "baseline": dict(self._baseline),
            "latency": None if table is None else table.to_plain(),
            "latency_digest": None if table is None else table.digest,
        }

    def load_state_dict(self, state: CostState) -> None:
        """Restore an earlier run's baseline and latency table.

        Raises:
            SettingError: The state lacks a metric of this model.
            LatencyError: Its latency table was altered.
        """
        known = state["baseline"]
        for name in self.metrics:
            check_setting(
                name in known,
                "budget",
                name,
                f"the run to resume had no such budget ({', '.join(known)}); its cost before pruning is not known. Use "
                "the same budgets as before",
            )
        self._baseline = {name: float(state["baseline"][name]) for name in self.metrics}
        if "latency" not in self.metrics:
            return
        if state["latency"] is None:
            raise LatencyError("the state holds no latency table: measure it again")
        table = LatencyTable.from_plain(state["latency"])
        if table.digest != state["latency_digest"]:
            raise LatencyError("the latency table in the state is not the one it was saved with")
        if self.latency_table is None or self.latency_table.digest != table.digest:
            self.latency_table = table
            self._build()

    # -- internals ----------------------------------------------------------------------------------------

    def _metric(self, name: str) -> Metric:
        cost_named(name, "metric")
        if name not in self._metrics:
            raise ValueError(f"this cost model was made for {', '.join(self.metrics)}, not for {name!r}")
        return self._metrics[name]

    def _allowed_widths(self, index: int) -> np.ndarray:
        if index not in self._allowed:
            self._allowed[index] = np.array(self.graph.allowed_widths(index), dtype=np.int64)
        return self._allowed[index]

    def _part(self, metric: str, index: int) -> Metric | None:
        key = (metric, index)
        if key not in self._parts:
            classes = np.unique(self._table.classes_of(index))
            self._parts[key] = self._metrics[metric].part(self._table.rows_touching(classes))
        return self._parts[key]

    def _leaving_classes(
        self, metric: str, index: int, mask: np.ndarray | None, order: Sequence[int] | np.ndarray | None
    ) -> np.ndarray:
        """Return the class of each kept unit of a group, in the order of removal; see `cost_curve`."""
        classes = self._table.classes_of(index)
        inside = np.ones(len(classes), dtype=bool)
        if mask is not None:
            inside = np.asarray(mask)[self.graph.groups[index].units].astype(bool)
        if order is not None:
            positions = np.asarray(order, dtype=np.int64)
            if not np.array_equal(np.sort(positions), np.flatnonzero(inside)):
                raise ValueError("order: give every kept position of the group once, in the order they leave")
            return classes[positions]
        if len(np.unique(classes)) <= 1:
            return classes[inside]

        # The class whose removal leaves the highest cost saves least and comes first.
        distinct, left = self._less_one_unit(metric, index, mask)
        least_saving_first = distinct[np.argsort(-left, kind="stable")]
        rank = {name: position for position, name in enumerate(least_saving_first)}
        return np.array(sorted(classes[inside].tolist(), key=lambda name: rank[name]), dtype=np.int64)

    def _less_one_unit(
        self, metric: str, index: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes of a group's units, and the network's cost with one unit of each class removed."""
        distinct = np.unique(self._table.classes_of(index))
        kept = self._table.kept_per_class(mask)
        fewer = kept.expand(len(distinct), -1).clone()
        fewer[torch.arange(len(distinct)), torch.from_numpy(distinct)] -= 1
        return distinct, self._metrics[metric].evaluate(self._table.counts(fewer)).numpy()
