"""The DALI pipeline's inputs for a plan, and its graph."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from image_classification.data.plan import BatchPlan
from image_classification.plain_data import Plain

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

INPUTS = ("paths", "starts", "shapes", "roi_starts", "roi_ends", "flips")
"""Inputs fed for every batch, each an array or list of N entries."""


class Regions(NamedTuple):
    """The part of each image to decode, and the region of it to resize."""

    starts: NDArray[np.int32]
    """(N, 2) top, left of the part to decode, raw pixels."""
    shapes: NDArray[np.int32]
    """(N, 2) height, width of the part to decode."""
    roi_starts: NDArray[np.float32]
    """(N, 2) top, left of the window, relative to the decoded part."""
    roi_ends: NDArray[np.float32]
    """(N, 2) bottom, right of the window, relative to the decoded part."""


def regions(plan: BatchPlan, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> Regions:
    """Split windows into whole pixels to decode and a region to resize.

    Args:
        plan: With `crop_first` the part to decode is the window; else it also has the margin that the filter sees.
        heights, widths: (N,) raw sizes.
    """
    low, extent = plan.windows[:, :2], plan.windows[:, 2:]
    high = low + extent
    start, stop = np.floor(low), np.ceil(high)
    if not plan.crop_first:
        # the triangle filter reaches as far as one output pixel, and at least one raw pixel
        reach = np.ceil(np.maximum(extent / np.array(plan.size), 1.0)) + 1
        raw = np.stack([heights, widths], axis=1).astype(np.float64)
        start, stop = np.maximum(start - reach, 0), np.minimum(stop + reach, raw)
    return Regions(
        start.astype(np.int32),
        (stop - start).astype(np.int32),
        (low - start).astype(np.float32),
        (np.minimum(high, stop) - start).astype(np.float32),
    )


def resize_parts(parts: Sequence[Tensor], plan: BatchPlan, pool: ThreadPoolExecutor) -> Tensor:
    """Resize and mirror cropped windows.

    Args:
        parts: (h, w, 3) uint8 of various sizes.
        plan: Output size and flips.
        pool: Threads to work in; torch releases the GIL while it resizes.

    Returns:
        (N, H, W, 3) uint8, stored plane by plane, as the filter leaves them.
    """
    planes = np.empty((len(parts), 3, *plan.size), dtype=np.uint8)

    def resize(row: int) -> None:
        image = parts[row].permute(2, 0, 1)[None]
        if image.shape[2:] != plan.size:
            image = F.interpolate(image, size=plan.size, mode="bilinear", antialias=True)
        # Use NumPy's copy: torch's would start a team of compute threads for each thread of the pool.
        plane = image[0].numpy()
        planes[row] = plane[:, :, ::-1] if plan.flips[row] else plane

    for _ in pool.map(resize, range(len(parts))):
        pass
    return torch.from_numpy(planes).permute(0, 2, 3, 1)


def build_graph(
    size: tuple[int, int] | None, *, inside: bool, names: tuple[str, ...], decoding: Plain
) -> DataNode:
    """Build the pipeline's graph: read, decode, resize, mirror; (H, W, 3) uint8 per sample.

    Args:
        size: Output height and width; None to decode only.
        inside: Whether windows never leave the image; otherwise images are decoded whole and padded with black.
        names: Names of the inputs.
        decoding: Options of the decoder.
    """
    fn = importlib.import_module("nvidia.dali.fn")
    types = importlib.import_module("nvidia.dali.types")
    kinds = {"paths": (types.UINT8, 1), "starts": (types.INT32, 1), "shapes": (types.INT32, 1),
             "roi_starts": (types.FLOAT, 1), "roi_ends": (types.FLOAT, 1), "flips": (types.INT32, 0)}  # fmt: skip
    inputs = {
        name: fn.external_source(name=name, dtype=kinds[name][0], ndim=kinds[name][1], batch=True)
        for name in names
    }
    encoded = fn.io.file.read(inputs["paths"])
    decoding = {**decoding, "output_type": types.RGB, "adjust_orientation": False}
    window = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    part: DataNode
    if inside:
        part = fn.decoders.image_slice(encoded, inputs["starts"], inputs["shapes"], **window, **decoding)
    else:
        whole = fn.decoders.image(encoded, **decoding)
        part = fn.slice(
            whole, inputs["starts"], inputs["shapes"], **window, out_of_bounds_policy="pad", fill_values=0
        )
    if size is None:
        return part
    region = {}
    if "roi_starts" in inputs:
        region = {"roi_start": inputs["roi_starts"], "roi_end": inputs["roi_ends"]}
    resized: DataNode = fn.resize(part, size=size, interp_type=types.INTERP_LINEAR, antialias=True, **region)
    if "flips" in inputs:
        resized = fn.flip(resized, horizontal=inputs["flips"])
    return resized
