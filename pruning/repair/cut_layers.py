"""The layers affected by a cut: parameters that lost inputs, and the elements they keep."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.cutting import tensor_cuts
from pruning.engine.named_tensors import named_tensors


def kept_elements(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> dict[str, Tensor]:
    """Return parameter → indices of the flattened original's elements kept in the flattened cut one; cut parameters
    only.
    """
    found = {}
    tensors = named_tensors(model)
    for name, cuts in tensor_cuts(graph, mask).items():
        if name not in tensors:
            continue
        positions = torch.arange(tensors[name].numel()).view(tensors[name].shape)
        for dim, index in cuts.items():
            positions = positions.index_select(dim, index)
        found[name] = positions.flatten()
    return found


def reading_parameters(graph: ChannelGraph, mask: np.ndarray) -> set[str]:
    """Return the parameters of contractions that lose some of the channels they read."""
    found: set[str] = set()
    for axis in graph.axes:
        stays = (axis.units < 0) | mask[np.maximum(axis.units, 0)]
        if axis.role == "in" and not stays.all():
            found.update(axis.aliases)
    return found
