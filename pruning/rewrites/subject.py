"""The subject of a pruner: the network with its graph, course and task."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor, nn

from image_classification.distributed import Distributed
from pruning.costs.budget import BudgetCourse
from pruning.engine.channel_graph import ChannelGraph
from pruning.task import Task
from pruning.task.explained import Autocast

#: Group index → (width,) scores.
Scores = dict[int, Tensor]
#: Group index → positions that stay, ascending; only for groups that change.
Kept = dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Subject:
    """The network to prune, its targets, and how it is run.

    Attributes:
        model: The bare network.
        graph: Its channel groups.
        course: The budget's targets, with the costs.
        task: How the network is run on a batch and evaluated.
        distributed: The ranks.
        autocast: Context factory of forward passes on calibration data.
    """

    model: nn.Module
    graph: ChannelGraph
    course: BudgetCourse
    task: Task
    distributed: Distributed
    autocast: Autocast
