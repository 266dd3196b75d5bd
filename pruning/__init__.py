"""Channel pruning that rewrites a network while it trains.

from pruning import Pruner, prune, load_pruned
prune(model, example_images, budget={"macs": 0.5})            # once, in place
pruner = Pruner(model, example_images, optimizer=optimizer)    # at intervals, see `pruner.py`
shrink(model, example_images)                                  # cut away what a masked network has no use for
"""

from pruning.budget import Budget
from pruning.channel_graph import ChannelGraph, Constraints
from pruning.graph import trace_groups
from pruning.pruner import Pruner, prune
from pruning.record import RewriteRecord
from pruning.shrink import ShrinkReport, shrink
from pruning.structure import load_pruned, save_pruned
from pruning.surgery import RewriteError, RewriteReport, prune_channels

__all__ = [
    "Budget",
    "ChannelGraph",
    "Constraints",
    "Pruner",
    "RewriteError",
    "RewriteRecord",
    "RewriteReport",
    "ShrinkReport",
    "load_pruned",
    "prune",
    "prune_channels",
    "save_pruned",
    "shrink",
    "trace_groups",
]
