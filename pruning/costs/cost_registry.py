"""Costs by name, and what each is built from. A new cost is one function with a decorator.

    @register_cost("energy", title="Energy per image", unit="mJ", divisor=1e-3)
    def energy(network: CostInputs) -> Metric:
        return Products(…)                       # a closed form of the counts in `network.table`

Once its module is imported, budgets, records and reports take it like the built-in ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor, nn

from image_classification.config import SettingError, nearest
from pruning.costs.activations import Activations, trace_activations
from pruning.costs.counts import CountTable, Metric
from pruning.costs.latency_table import LatencyTable
from pruning.engine.channel_graph import ChannelGraph


@dataclasses.dataclass(frozen=True)
class CostInputs:
    """The network that a cost is built for.

    Attributes:
        graph: Its channel graph, at the present widths.
        model: The bare network.
        images: Its positional arguments, of the size that costs are counted at.
        table: Where a cost asks for the counts that it is a function of (`row`, `rows`).
        measure: Activations → the latency table of this device, measured where it is not known yet.
    """

    graph: ChannelGraph
    model: nn.Module
    images: tuple[object, ...]
    table: CountTable
    measure: Callable[[Activations], LatencyTable]

    @functools.cached_property
    def activations(self) -> Activations:
        """Sizes and lifetimes of the network's activations; two images are enough to find them."""
        few = tuple(a[:2] if isinstance(a, Tensor) and a.dim() > 1 else a for a in self.images)
        return trace_activations(self.model, few, self.graph)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A registered cost.

    Attributes:
        name: As in budgets: `macs`.
        build: Makes the function of the counts.
        title: For tables: "Multiply-accumulates".
        short: Within a sentence: "MACs".
        unit: Of the number divided by `divisor`.
        divisor: Makes the number readable.
        measured: It holds for one device only, so the report, which may run on another one, leaves it out.
    """

    name: str
    build: Callable[[CostInputs], Metric]
    title: str
    short: str
    unit: str
    divisor: float
    measured: bool


_REGISTRY: dict[str, Cost] = {}


def register_cost(
    name: str,
    *,
    title: str | None = None,
    short: str | None = None,
    unit: str = "",
    divisor: float = 1.0,
    measured: bool = False,
) -> Callable[[Callable[[CostInputs], Metric]], Callable[[CostInputs], Metric]]:
    """Decorator: make a cost known by name to budgets, `CostModel` and the report.

    Args:
        name: Its name, without "=", which ends it in `METRIC=SHARE`.
        title: See `Cost`; the name by default.
        short: See `Cost`; the name by default.
        unit: See `Cost`.
        divisor: See `Cost`.
        measured: See `Cost`.

    Raises:
        ValueError: The name is taken by another function, or holds "=".
    """
    if not name or "=" in name:
        raise ValueError(f"cost name {name!r}: give a name without '='")

    def register(build: Callable[[CostInputs], Metric]) -> Callable[[CostInputs], Metric]:
        taken = _REGISTRY.get(name)
        if taken is not None and taken.build.__qualname__ != build.__qualname__:
            raise ValueError(f"cost name {name!r} is taken by {taken.build.__qualname__}: choose another")
        _REGISTRY[name] = Cost(name, build, title or name, short or name, unit, divisor, measured)
        return build

    return register


def cost_names() -> list[str]:
    """Names of all registered costs, the built-in ones first."""
    return list(_REGISTRY)


def cost_named(name: str, setting: str = "metrics") -> Cost:
    """The cost that is registered under a name.

    Args:
        name: Its name.
        setting: The argument that it was given by, for the message.

    Raises:
        SettingError: There is no such cost; the nearest name is suggested.
    """
    if name not in _REGISTRY:
        names = cost_names()
        problem = f"unknown cost; choose from {', '.join(names)}{nearest(name.lower(), names)}"
        raise SettingError(setting, name, problem)
    return _REGISTRY[name]
