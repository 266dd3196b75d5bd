"""What a resumed run takes from the run before, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from image_classification.config import ConfigError
from pruning.engine.constraints import Constraints
from pruning.engine.trace_groups import trace_groups
from pruning.rewrites.resuming import graph_of


def test_other_modules_to_leave_alone_are_refused() -> None:
    """The stored graph has them frozen already: a pattern that comes later would have no effect."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    images, ignoring = torch.randn(2, 3, 8, 8), Constraints(ignored=("0",))
    stored = trace_groups(model, images, constraints=ignoring).state_dict()
    graph = graph_of(model, images, ignoring, {"graph": stored})
    assert len(graph.prunable) == 1
    with pytest.raises(ConfigError, match="ignored='none'"):
        graph_of(model, images, Constraints(), {"graph": stored})
    del stored["ignored"]  # as a checkpoint of an older version
    graph_of(model, images, Constraints(), {"graph": stored})
