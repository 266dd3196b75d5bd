"""Latency from a measured table: seconds per batch on this device, as a function of the widths.

    latency = fixed + scale · Σ_layers T_layer(out width, in width) + per_element · elements moved by the rest

Convolutions and linear layers are measured in isolation on a grid of widths, each distinct shape once, and interpolated
bilinearly; T is made monotone, since noise must not reward wider layers. Everything else (normalisation, activations,
pooling, additions, launches) is the time the whole network takes beyond these layers: a fixed part and a part
proportional to the elements read and written. `latency_measure` makes the tables.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from pruning.costs.activations import Activations, Kernel
from pruning.costs.counts import CountTable, OnDevices
from pruning.costs.latency_table import Grid, LatencyError, LatencyTable
from pruning.costs.product_costs import Products


class Latency:
    """Seconds per batch from a table; a `Metric`.

    Raises:
        LatencyError: The table was made for another network.
    """

    def __init__(self, table: LatencyTable, activations: Activations, rows: CountTable) -> None:
        missing = [kernel.name for kernel in activations.kernels if kernel.name not in table.layers]
        if missing:
            raise LatencyError(
                f"the latency table does not know layer {missing[0].rpartition(':')[0]!r}: it was made for another "
                "network. Measure it again"
            )
        layers = [
            _Layer(table.grids[table.layers[k.name]], rows.row(k.out_units), rows.row(in_units_of(k)))
            for k in activations.kernels
        ]
        terms = [
            (table.per_element * extent.factor, rows.rows(extent.vectors)) for extent in activations.traffic
        ]
        self._sum = _Sum(layers, Products(terms), table.fixed, table.scale)

    def evaluate(self, counts: Tensor) -> Tensor:
        """See `Metric`."""
        return self._sum.evaluate(counts)

    def part(self, rows: Tensor) -> _Sum:
        """See `Metric`."""
        return self._sum.part(rows)


def in_units_of(kernel: Kernel) -> np.ndarray:
    """Return the units of a kernel's second dimension; layers that lose whole groups have none, which counts as 1."""
    return kernel.in_units if kernel.in_units.size else np.array([-1])


@dataclasses.dataclass(frozen=True)
class _Layer:
    grid: Grid
    out_row: int
    in_row: int


class _Sum:
    """fixed + scale · Σ interpolated layers + the rest."""

    def __init__(self, layers: list[_Layer], rest: Products, fixed: float, scale: float) -> None:
        self._layers = layers
        self._rest = rest
        self._fixed = fixed
        self._scale = scale
        depth = 2 + max((max(len(x.grid.out_widths), len(x.grid.in_widths)) for x in layers), default=0)
        grids = [_padded(layer.grid, depth) for layer in layers]
        self._constants = OnDevices(
            out_rows=torch.tensor([layer.out_row for layer in layers], dtype=torch.int64),
            in_rows=torch.tensor([layer.in_row for layer in layers], dtype=torch.int64),
            out_widths=torch.stack([g[0] for g in grids]) if grids else torch.zeros(0, depth),
            in_widths=torch.stack([g[1] for g in grids]) if grids else torch.zeros(0, depth),
            seconds=torch.stack([g[2] for g in grids]).reshape(-1) if grids else torch.zeros(0),
        )
        self._depth = depth

    def evaluate(self, counts: Tensor) -> Tensor:
        """See `Metric`."""
        return self._fixed + self._scale * self.layers(counts).sum(-1) + self._rest.evaluate(counts)

    def part(self, rows: Tensor) -> _Sum:
        """See `Metric`."""
        touched = rows.tolist()
        layers = [layer for layer in self._layers if touched[layer.out_row] or touched[layer.in_row]]
        return _Sum(layers, self._rest.part(rows), 0.0, self._scale)

    def layers(self, counts: Tensor) -> Tensor:
        """Return the isolated time of each layer in seconds, (..., layers), bilinear in its two widths."""
        c = self._constants.at(counts.device)
        i, u = _locate(counts[..., c["out_rows"]], c["out_widths"])
        j, v = _locate(counts[..., c["in_rows"]], c["in_widths"])
        corner = torch.arange(len(self._layers), device=counts.device) * self._depth**2 + i * self._depth + j
        table = c["seconds"]
        low = table[corner] * (1 - v) + table[corner + 1] * v
        high = table[corner + self._depth] * (1 - v) + table[corner + self._depth + 1] * v
        return (low * (1 - u) + high * u).clamp_min(0)


def _locate(widths: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return each width's grid interval, (..., layers), and its position within (0 … 1; below 0 below the grid)."""
    inner = grid[:, 1:-1]
    index = (widths.detach().unsqueeze(-1) >= inner).sum(-1)
    layer = torch.arange(grid.shape[0], device=grid.device)
    low, high = grid[layer, index], grid[layer, index + 1]
    return index, (widths - low) / (high - low)


def _padded(grid: Grid, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad a grid to a common size and make it monotone; it is constant beyond its last width."""
    seconds = monotone(np.array(grid.seconds, dtype=np.float64))
    fill = [(0, depth - size) for size in seconds.shape]
    widths = []
    for axis, (_, more) in zip((grid.out_widths, grid.in_widths), fill, strict=True):
        widths.append(torch.tensor([*axis, *range(axis[-1] + 1, axis[-1] + 1 + more)], dtype=torch.float64))
    return widths[0], widths[1], torch.from_numpy(np.pad(seconds, fill, mode="edge"))


def monotone(seconds: np.ndarray) -> np.ndarray:
    """Return the mean of the smallest table above and the largest table below that never fall along any axis."""
    above, below = seconds, seconds
    for axis in range(seconds.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    mean: np.ndarray = (above + below) / 2
    return mean
