"""Registry of costs, and the inputs each is built from. A new cost is one function with a decorator.

    @register_cost("energy", title="Energy per image", unit="mJ", divisor=1e-3)
    def energy(network: CostInputs) -> Metric:
        return Products(…)                       # a closed form of the counts in `network.table`

Once its module is imported, budgets, records and reports treat it like the built-in ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import nn

from image_classification.config import SettingError, nearest
from pruning.costs.activations import Activations, trace_activations
from pruning.costs.counts import CountTable, Metric
from pruning.costs.latency_table import LatencyTable
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.examples import Example


@dataclasses.dataclass(frozen=True)
class CostInputs:
    """The network that a cost is built for.

    Attributes:
        graph: Its channel graph, at the current widths.
        model: The bare network.
        example: Its arguments, of the size for which costs are counted.
        table: Table that a cost requests its counts from (`row`, `rows`).
        measure: Maps activations to the latency table of this device, measuring it if it is unknown.
    """

    graph: ChannelGraph
    model: nn.Module
    example: Example
    table: CountTable
    measure: Callable[[Activations], LatencyTable]

    @functools.cached_property
    def activations(self) -> Activations:
        """Return sizes and lifetimes of the network's activations; two images suffice to find them."""
        return trace_activations(self.model, self.example.few(), self.graph)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A registered cost.

    Attributes:
        name: Name in budgets: `macs`.
        build: Builds the cost as a function of the counts.
        title: Name in tables: "Multiply-accumulates".
        short: Name within a sentence: "MACs".
        unit: Unit of the number divided by `divisor`.
        divisor: Scales the number to a readable unit.
        measured: Whether it is measured, so that it holds for one device only; reports, which may run on another
            device, omit it.
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
    """Decorator that registers a cost by name for budgets, `CostModel` and the report.

    Args:
        name: Its name. It must not contain "=", the separator in `METRIC=SHARE`.
        title: See `Cost`; the name by default.
        short: See `Cost`; the name by default.
        unit: See `Cost`.
        divisor: See `Cost`.
        measured: See `Cost`.

    Raises:
        ValueError: The name is taken by another function or contains "=".
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
    """Return the names of all registered costs, the built-in ones first."""
    return list(_REGISTRY)


def cost_named(name: str, setting: str = "metrics") -> Cost:
    """Return the cost registered under a name.

    Args:
        name: Its name.
        setting: Argument that the name was passed to, for the message.

    Raises:
        SettingError: There is no such cost; the nearest name is suggested.
    """
    if name not in _REGISTRY:
        names = cost_names()
        problem = f"unknown cost; choose from {', '.join(names)}{nearest(name.lower(), names)}"
        raise SettingError(setting, name, problem)
    return _REGISTRY[name]
