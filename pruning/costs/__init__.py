"""Costs of a network at any widths, and budgets. Importing this package registers the built-in costs.

costs = CostModel(graph, model, images, metrics=("macs", "params")) costs.cost("macs", mask)
"""

from pruning.costs import built_in
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.costs.cost_registry import Cost, CostInputs, cost_named, cost_names, register_cost
from pruning.costs.counts import Metric
from pruning.costs.product_costs import Products

__all__ = [
    "Budget",
    "Cost",
    "CostInputs",
    "CostModel",
    "Metric",
    "Products",
    "built_in",
    "cost_named",
    "cost_names",
    "register_cost",
]
