"""Isolated calls of a convolution or linear layer at any widths, for measuring the latency table.

Inputs and weights are views of two shared pools of numbers, so a table of hundreds of entries needs no more memory than
its largest entry. Each call takes its weights from another part of the pool, since a network's weights are not in the
cache either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.costs.activations import Geometry, Kernel

_SMALLEST_WEIGHT_POOL = 1 << 22


def kernel_shapes(
    geometry: Geometry, rows: int, num_out: int, num_in: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return input shape, weight shape and number of groups at other widths.

    Args:
        geometry: Geometry of a `Kernel`.
        rows: First dimension of the input.
        num_out: Length of the kernel's `out_units`.
        num_in: Length of its `in_units`; 0 if whole groups are removed.
    """
    if geometry["kind"] == "linear":
        return (rows, num_in), (num_out, num_in), 1
    first, second, *window = geometry["weight"]
    groups, (_, *space) = geometry["groups"], geometry["input"]
    if geometry["transposed"]:
        return (rows, num_in, *space), (num_in, num_out, *window), 1
    if num_in == 0:  # whole groups are removed
        groups = num_out * groups // first
        return (rows, groups * second, *space), (num_out, second, *window), groups
    return (rows, groups * num_in, *space), (num_out, num_in, *window), groups


class KernelBench:
    """Prepares calls of kernels for the stopwatch.

    Args:
        batch_size: Images per call.
        device, dtype: Device and precision to compute on.
        channels_last: Memory format of inputs and weights.
    """

    def __init__(
        self, batch_size: int, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> None:
        self._batch_size = batch_size
        self._channels_last = channels_last
        self._device = device
        self._dtype = dtype
        self._inputs = torch.empty(0)
        self._weights = torch.empty(0)
        self._offset = 0

    def prepare(self, entries: Sequence[tuple[Kernel, int, int]]) -> list[Callable[[], Tensor]]:
        """Return calls of these (kernel, out width, in width); valid until the next `prepare`."""
        shapes = [
            kernel_shapes(kernel.geometry, round(kernel.rows * self._batch_size), num_out, num_in)
            for kernel, num_out, num_in in entries
        ]
        self._inputs = self._pool(max(math.prod(x) for x, _, _ in shapes))
        self._weights = self._pool(max(_SMALLEST_WEIGHT_POOL, 2 * max(math.prod(w) for _, w, _ in shapes)))
        return [
            self._call(kernel.geometry, *shape) for (kernel, _, _), shape in zip(entries, shapes, strict=True)
        ]

    def _pool(self, size: int) -> Tensor:
        return torch.rand(size, device=self._device).sub_(0.5).to(self._dtype)

    def _call(
        self, geometry: Geometry, shape: tuple[int, ...], weight_shape: tuple[int, ...], groups: int
    ) -> Callable[[], Tensor]:
        x = self._shaped(self._inputs[: math.prod(shape)], shape)
        bias = self._weights[: self._outputs(geometry, weight_shape)] if geometry["bias"] else None
        if geometry["kind"] == "linear":
            return lambda: F.linear(x, self._weight(weight_shape), bias)
        stride, padding, dilation = (geometry[key] for key in ("stride", "padding", "dilation"))
        transposed, output_padding = geometry["transposed"], geometry["output_padding"]
        return lambda: torch.convolution(
            x, self._weight(weight_shape), bias, stride, padding, dilation, transposed, output_padding, groups
        )

    @staticmethod
    def _outputs(geometry: Geometry, weight_shape: tuple[int, ...]) -> int:
        return weight_shape[1] if geometry.get("transposed") else weight_shape[0]

    def _weight(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._offset + size > self._weights.numel():
            self._offset = 0
        flat = self._weights[self._offset : self._offset + size]
        self._offset += size
        return self._shaped(flat, shape)

    def _shaped(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self._channels_last and len(shape) == 4:
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)


def grid_widths(units: np.ndarray, points: int, step: int) -> list[int]:
    """Return the widths to measure along one dimension, from an eighth of it to all of it.

    Args:
        units: Units along the dimension; without units it never changes and has a single width.
        points: Number of widths.
        step: Widths are multiples of this. At 1 the inner widths are made odd, because pruning without rounding mostly
            produces uneven widths, at which kernels are slower.
    """
    size = len(units)
    if size == 0 or units.max() < 0:
        return [size]
    found = {size}
    for share in np.linspace(1 / 8, 1, points)[:-1]:
        width = max(step, round(share * size / step) * step)
        if step == 1 and width % 2 == 0:
            width += 1
        if width < size:
            found.add(width)
    return sorted(found)
