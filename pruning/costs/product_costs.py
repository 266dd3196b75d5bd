"""Costs that are sums of products of counts: multiply-accumulates and parameters.

MACs   = Σ_layers   constant · Π_axes count          (constant: kernel size × output positions, per image)
params = Σ_tensors  Π_dimensions count
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pruning.costs.counts import ONE, CountTable, OnDevices
from pruning.engine.channel_graph import ChannelGraph


class Products:
    """A sum of terms `coefficient · Π count[row]`.

    Args:
        terms: (coefficient, rows of the factors); terms with the same rows are merged if `merge` is set.
        merge: Set if only the sum matters.
    """

    def __init__(self, terms: Iterable[tuple[float, Sequence[int]]], merge: bool = True) -> None:
        listed = [(float(coefficient), tuple(sorted(rows))) for coefficient, rows in terms]
        if merge:
            sums: dict[tuple[int, ...], float] = {}
            for coefficient, rows in listed:
                sums[rows] = sums.get(rows, 0.0) + coefficient
            listed = [(coefficient, rows) for rows, coefficient in sums.items()]
        self._terms = listed
        factors = max((len(rows) for _, rows in listed), default=1) or 1
        index = torch.full((len(listed), factors), ONE, dtype=torch.int64)
        for term, (_, rows) in enumerate(listed):
            index[term, : len(rows)] = torch.tensor(rows, dtype=torch.int64)
        coefficients = torch.tensor([coefficient for coefficient, _ in listed], dtype=torch.float64)
        self._constants = OnDevices(coefficients=coefficients, index=index)

    def values(self, counts: Tensor) -> Tensor:
        """Return the value of every term, (..., terms)."""
        constants = self._constants.at(counts.device)
        values = constants["coefficients"]
        for factor in constants["index"].unbind(1):
            values = values * counts[..., factor]
        return values

    def evaluate(self, counts: Tensor) -> Tensor:
        """See `Metric`."""
        return self.values(counts).sum(-1)

    def part(self, rows: Tensor) -> Products:
        """See `Metric`."""
        touched = rows.tolist()
        return Products([term for term in self._terms if any(touched[row] for row in term[1])])


def macs_of(graph: ChannelGraph, table: CountTable) -> Products:
    """Return MACs per image in evaluation mode; contractions only, as counted by PyTorch's flop counter (÷ 2)."""
    layers = [layer for layer in graph.layers if not layer.training_only]
    return Products((layer.constant, table.rows(layer.axes)) for layer in layers)


def parameters_of(graph: ChannelGraph, model: nn.Module, table: CountTable) -> Products:
    """Return the number of parameters, shared ones counted once; buffers do not count."""
    axes: dict[str, dict[int, np.ndarray]] = {}
    for axis in graph.axes:
        axes.setdefault(axis.tensor, {})[axis.dim] = axis.units
    terms = []
    for name, parameter in model.named_parameters():
        carried = axes.get(name, {})
        rest = math.prod(size for dim, size in enumerate(parameter.shape) if dim not in carried)
        terms.append((rest, table.rows(list(carried.values()))))
    return Products(terms)
