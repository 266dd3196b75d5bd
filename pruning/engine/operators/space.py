"""Pooling, resampling and other operators on the pixels of every channel by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from image_classification.models.running import Kwargs
from pruning.engine.labeller import Labeller, along, operation_name
from pruning.engine.labels import Slot, Value, support
from pruning.engine.operators import unknowns
from pruning.engine.operators.register import always, arguments, dim_list, elsewhere, operator, within
from pruning.engine.operators.windows import kept_windows, slide
from pruning.engine.traces import Operation, Trace


def pads_nothing(trace: Trace, operation: Operation, value: int) -> bool:
    """Whether an average takes no zeros beyond the border in."""
    padding = arguments(operation)["padding"]
    return not any(padding if isinstance(padding, (list, tuple)) else [padding])


def _window(named: Kwargs, dim: int) -> tuple[int, int, int] | None:
    """The window of a pooling in three dimensions along one of its input's; it averages nothing along the others."""
    place = dim - (len(named["self"].shape) - 3)
    kernel, stride, padding = (
        _each(size)
        for size in (named["kernel_size"], named["stride"] or named["kernel_size"], named["padding"])
    )
    if place < 0 or math.prod(kernel) > kernel[place]:
        return None
    return kernel[place], stride[place], padding[place]


def _each(sizes: int | Sequence[int]) -> list[int]:
    """One number per dimension; a single one stands for all three."""
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return sizes * 3 if len(sizes) == 1 else sizes


@operator("avg_pool2d", constants=unknowns.average_pool, keeps_offsets=pads_nothing)
@operator("avg_pool3d", constants=unknowns.average_pool, statistics=kept_windows(_window))
@operator("max_pool2d_with_indices", constants=unknowns.with_positions, keeps_offsets=always)
@operator(
    "max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d", constants=unknowns.with_positions
)
@operator("_adaptive_avg_pool2d", keeps_offsets=always)
@operator(
    "avg_pool1d max_pool2d max_pool1d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_max_pool1d upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_nearest3d upsample_trilinear3d "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "lp_pool2d mkldnn_max_pool2d _fft_r2c _fft_c2r _fft_c2c"
)
def in_space(run: Labeller, operation: Operation) -> list[Value]:
    """Operators that work on every channel's map on its own."""
    x = run.at(operation.args[0])
    name = operation_name(operation.func)
    spatial = int(next((digit for digit in name if digit in "123"), "2"))
    dims = tuple(range(len(x.shape) - spatial, len(x.shape)))
    reason = f"{run.describe(operation)} mixes positions along it"
    if name.startswith("_fft"):
        dims = dim_list(operation.args[1], len(x.shape))
    slots: list[Slot] = []
    for slot in x.slots:
        window = (
            _window({**arguments(operation), "self": x}, support(slot)[0]) if name == "avg_pool3d" else None
        )
        moved = slide(run, operation, x, slot, window)
        one = Value(x.shape, (slot,))
        slots += [moved] if moved is not None else within(run, one, dims, reason)
    value = run.make(operation, run.out_shape(operation), slots)
    return [value] * len(operation.outputs)


@operator("max_unpool2d max_unpool3d")
def unpooled(run: Labeller, operation: Operation) -> Value:
    """Maxima put back where they came from, channel by channel."""
    x, places = run.at(operation.args[0]), run.at(operation.args[1])
    channels = run.combine(operation, [x, places], x.shape)
    shape = run.out_shape(operation)
    space = tuple(range(len(x.shape) - int(operation_name(operation.func)[-2]), len(x.shape)))
    reason = f"{run.describe(operation)} mixes positions along it"
    return run.make(operation, shape, list(within(run, channels, space, reason)))


@operator("affine_grid_generator")
def grid(run: Labeller, operation: Operation) -> Value:
    """Points to sample at, from a matrix for every image."""
    run.freeze_value(run.at(operation.args[0]), f"{run.describe(operation)} takes its points from it")
    return Value(run.out_shape(operation))


@operator("grid_sampler grid_sampler_2d grid_sampler_3d")
@elsewhere("torchvision::roi_align torchvision::roi_pool")
def sampled(run: Labeller, operation: Operation) -> list[Value]:
    """Every channel resampled at the same points, or within the same boxes."""
    channels = along(_channels(run, operation), 1, len(run.out_shape(operation)))
    value = run.make(operation, run.out_shape(operation), [channels])
    return [value] * len(operation.outputs)


@elsewhere("torchvision::ps_roi_align torchvision::ps_roi_pool")
def sampled_by_position(run: Labeller, operation: Operation) -> list[Value]:
    """Each cell of a box is read from a channel of its own: the channels of all cells go together."""
    shape = run.out_shape(operation)
    cells = run.table.unite_along(_channels(run, operation).reshape(shape[1], -1), (1,))
    value = run.make(operation, shape, [along(cells, 1, len(shape))])
    return [value, *(Value(run.info(out).shape) for out in operation.outputs[1:] if out is not None)]


def _channels(run: Labeller, operation: Operation) -> np.ndarray:
    """Labels of the channels of what is sampled; where it is sampled does not change."""
    x, points = run.at(operation.args[0]), run.at(operation.args[1])
    run.freeze_value(points, f"{run.describe(operation)} takes its points from it")
    space = [dim for dim in range(len(x.shape)) if dim != 1]
    slots = within(run, x, space, f"{run.describe(operation)} mixes positions along it")
    return slots[0].reshape(-1) if slots else np.full(x.shape[1], -1)
