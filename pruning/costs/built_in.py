"""The built-in costs, in the order in which tables show them."""

from __future__ import annotations

from pruning.costs.cost_registry import CostInputs, register_cost
from pruning.costs.counts import Metric
from pruning.costs.latency import Latency
from pruning.costs.memory import PeakMemory
from pruning.costs.product_costs import macs_of, parameters_of


@register_cost("macs", title="Multiply-accumulates", short="MACs", unit="MMACs", divisor=1e6)
def macs(network: CostInputs) -> Metric:
    """Multiply-accumulates per image of the contractions, as counted by PyTorch's flop counter (÷ 2)."""
    return macs_of(network.graph, network.table)


@register_cost("params", title="Parameters", short="parameters", unit="M", divisor=1e6)
def params(network: CostInputs) -> Metric:
    """Number of parameters, with shared ones counted once."""
    return parameters_of(network.graph, network.model, network.table)


@register_cost(
    "memory",
    title="Peak activation memory, one image",
    short="activation memory",
    unit="MiB",
    divisor=2**20,
)
def memory(network: CostInputs) -> Metric:
    """Peak activation bytes per image of an inference pass; `memory.py` defines what is counted."""
    return PeakMemory(network.activations, network.table)


@register_cost("latency", title="Latency", short="latency", unit="ms", divisor=1e-3, measured=True)
def latency(network: CostInputs) -> Metric:
    """Seconds per batch on this device, from a measured table; see `latency.py`."""
    return Latency(network.measure(network.activations), network.activations, network.table)
