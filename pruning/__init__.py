"""Channel pruning that rewrites a network while it trains.

from pruning import Pruner, load_pruned, prune

prune(model, example_images, budget={"macs": 0.5})            # once, in place
pruner = Pruner(model, example_images, optimizer=optimizer)   # at intervals; see `pruner.py`
shrink(model, example_images)                                 # removes channels that a mask has closed
"""

from typing import TYPE_CHECKING

from image_classification.lazy import lazy_names

if TYPE_CHECKING:
    from pruning.costs.budget import Budget
    from pruning.engine.channel_graph import ChannelGraph
    from pruning.engine.constraints import Constraints
    from pruning.engine.cutting import RewriteError
    from pruning.engine.operators import register_operator
    from pruning.engine.surgery import RewriteReport, prune_channels
    from pruning.engine.trace_groups import trace_groups
    from pruning.files.saved_network import load_pruned, save_pruned
    from pruning.masked.shrinking import ShrinkReport, shrink
    from pruning.pruner import Pruner, prune
    from pruning.rewrites.pruner_settings import PrunerSettings
    from pruning.rewrites.rewrite_record import RewriteRecord

__all__ = [
    "Budget",
    "ChannelGraph",
    "Constraints",
    "Pruner",
    "PrunerSettings",
    "RewriteError",
    "RewriteRecord",
    "RewriteReport",
    "ShrinkReport",
    "load_pruned",
    "prune",
    "prune_channels",
    "register_operator",
    "save_pruned",
    "shrink",
    "trace_groups",
]
#: Name → module that defines it.
_MODULES = {
    "Budget": "pruning.costs.budget",
    "ChannelGraph": "pruning.engine.channel_graph",
    "Constraints": "pruning.engine.constraints",
    "Pruner": "pruning.pruner",
    "PrunerSettings": "pruning.rewrites.pruner_settings",
    "RewriteError": "pruning.engine.cutting",
    "RewriteRecord": "pruning.rewrites.rewrite_record",
    "RewriteReport": "pruning.engine.surgery",
    "ShrinkReport": "pruning.masked.shrinking",
    "load_pruned": "pruning.files.saved_network",
    "prune": "pruning.pruner",
    "prune_channels": "pruning.engine.surgery",
    "register_operator": "pruning.engine.operators",
    "save_pruned": "pruning.files.saved_network",
    "shrink": "pruning.masked.shrinking",
    "trace_groups": "pruning.engine.trace_groups",
}
__getattr__ = lazy_names(__name__, _MODULES)
