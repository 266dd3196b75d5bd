"""Pooling, resampling and other operators on the pixels of every channel by itself."""

from __future__ import annotations

from pruning.labelling import Labeller, operation_name
from pruning.labels import Value, support
from pruning.operators.register import dim_list, rule
from pruning.tracing import Operation


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool1d", "max_pool2d_with_indices",
      "max_pool3d_with_indices", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "_upsample_bilinear2d_aa",
      "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "upsample_nearest3d", "upsample_trilinear3d",
      "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "lp_pool2d",
      "mkldnn_max_pool2d", "_fft_r2c", "_fft_c2r", "_fft_c2c")  # fmt: skip
def in_space(run: Labeller, operation: Operation) -> list[Value]:
    """Operators that work on every channel's map on its own."""
    x = run.at(operation.args[0])
    name = operation_name(operation.func)
    spatial = int(next((digit for digit in name if digit in "123"), "2"))
    dims = tuple(range(len(x.shape) - spatial, len(x.shape)))
    if name.startswith("_fft"):
        dims = dim_list(operation.args[1], len(x.shape))
    run.freeze_value(x, f"{run.describe(operation)} mixes positions along it", dims)
    slots = [slot for slot in x.slots if all(slot.shape[dim] == 1 for dim in dims)]
    value = run.make(operation, run.out_shape(operation), slots)
    return [value] * len(operation.outputs)


@rule("grid_sampler", "grid_sampler_2d")
def sampled(run: Labeller, operation: Operation) -> Value:
    """Resampling of every channel at the same points."""
    x, grid = run.at(operation.args[0]), run.at(operation.args[1])
    run.freeze_value(grid, f"{run.describe(operation)} takes its points from it")
    run.freeze_value(x, f"{run.describe(operation)} mixes positions along it", (2, 3))
    return run.make(operation, run.out_shape(operation), [s for s in x.slots if support(s) == (1,)])
