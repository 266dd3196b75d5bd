"""Reconstruction: the error that least squares cannot compensate when a channel is removed.

The units of a group are eliminated one by one, each time the unit whose loss the others compensate best. A unit's score
is the error accumulated in the layers that read the group by the time the unit is eliminated, as a share of their
outputs' variance. So scores predict the error left after a repair, rather than the size of a weight or derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from image_classification.config import check_setting
from image_classification.distributed import Distributed
from pruning.criteria.criterion import NetworkCriterion, register_criterion
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.repair.elimination import DEFAULT_RIDGE, elimination
from pruning.repair.unit_inputs import reading_units, unit_inputs
from pruning.task import Batch, Task


@register_criterion("reconstruction")
class Reconstruction(NetworkCriterion):
    """Scores by residual error after least squares; see `pruning/repair/elimination.py` for the formula.

    Args:
        ridge: λ relative to the mean square of a layer's inputs.
    """

    def __init__(self, ridge: float = DEFAULT_RIDGE) -> None:
        check_setting(ridge > 0, "ridge", ridge, "must be positive")
        self.ridge = ridge

    def score_network(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        task: Task,
        distributed: Distributed,
    ) -> dict[int, Tensor]:
        """See `NetworkCriterion`. Groups that no contraction reads are left out."""
        inputs = unit_inputs(model, graph, batches, reading_units(graph), task=task, distributed=distributed)
        found = {}
        for group in groups:
            units = torch.from_numpy(group.units)
            readers = [one for one in inputs if bool(torch.isin(one.units, units).any())]
            if not readers:
                continue
            order, lost = elimination(readers, units, self.ridge)
            scores = torch.empty(group.width, dtype=torch.float64)
            scores[order] = lost
            found[group.index] = scores
        return found
