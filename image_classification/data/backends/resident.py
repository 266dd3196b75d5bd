"""The resident backend: a small set is decoded once into device memory, then cropped and resized there.

Crop, antialiased resize and flip of an image are two matrix products, W_y · image · W_xᵀ, whose rows hold the triangle
filter of each output pixel; every image of a batch has its own pair. With rounding to integers after each product, as
in Pillow, the result equals Pillow's. A whole epoch is planned and moved to the device at once, without any device
sync.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from image_classification.config import SettingError
from image_classification.data.backends.backend import register_backend
from image_classification.data.decode import Decoded, UnreadableError, open_sample
from image_classification.data.device_stage import DeviceStage
from image_classification.data.loader import LoaderOptions, PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.data.plan import BatchPlan, Planner
from image_classification.models import exact_float32

_SHARE_OF_MEMORY = 0.5
_CHUNK = 64


@register_backend("resident")
class ResidentLoader(PlannedLoader):
    """See `PlannedLoader`. The set is decoded when the first batch is requested, and stays in memory until `close`.

    Raises:
        SettingError: The images, each padded to the largest height and width, take more than half of the free memory.
    """

    _canvas: Tensor | None = None
    _bad: dict[int, str]

    def __init__(
        self, manifest: Manifest, planner: Planner, stage: DeviceStage, options: LoaderOptions
    ) -> None:
        super().__init__(manifest, planner, stage, options)
        readable = ~self.samples.known
        height = int(manifest.heights[readable].max(initial=1))
        width = int(manifest.widths[readable].max(initial=1))
        self._canvas_size = height, width
        num_bytes = len(manifest) * height * width * 3
        free = free_memory(stage.device)
        if num_bytes > _SHARE_OF_MEMORY * free:
            raise SettingError(
                "data_backend",
                "resident",
                f"needs {num_bytes / 2**30:.1f} GiB for {len(manifest)} images of up to {height}×{width} pixels; "
                f"{stage.device} has {free / 2**30:.1f} GiB free, of which half may be used: choose dali-gpu, dali-cpu "
                "or pytorch, or make the images smaller with `python -m image_classification prepare`",
            )

    def decoded(self, plans: Iterator[BatchPlan]) -> Generator[Decoded, None, None]:
        """See `PlannedLoader.decoded`."""
        if self._canvas is None:
            self._canvas = self._decode_all()
        while (plan := next(plans, None)) is not None:
            yield from self._rest_of_epoch(plan, self._canvas)

    def plans(self, epoch: int, step: int) -> Iterator[BatchPlan]:
        """Yield the rank's plans from a position on: one per epoch, covering all its remaining steps."""
        planner = self.planner
        for at_epoch, at_step in planner.positions(epoch, step):
            if (at_epoch, at_step) == (epoch, step) or at_step == 0:
                ids = np.concatenate(
                    [planner.ids(at_epoch, later) for later in range(at_step, planner.num_steps)]
                )
                ids = self.samples.resolve(ids)
                if ids.size:
                    yield planner.plan(at_epoch, at_step, ids)

    def _rest_of_epoch(self, whole: BatchPlan, canvas: Tensor) -> Generator[Decoded, None, None]:
        """Slice the plan of an epoch's remaining steps into batches."""
        ids = whole.sample_ids
        raw_sizes = np.stack([self.manifest.heights[ids], self.manifest.widths[ids]], axis=1)

        def moved(column: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(column)).to(canvas.device)

        # The columns of the whole epoch are moved to the device at once; a batch is a slice of each.
        index, flips = moved(ids), moved(whole.flips)
        windows, sizes = moved(whole.windows.astype(np.float32)), moved(raw_sizes.astype(np.float32))
        for start in range(0, len(whole), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(whole)))
            plan = whole.rows(rows.start, rows.stop, whole.step + start // self.batch_size)
            bad = {int(i): self._bad[int(i)] for i in plan.sample_ids if int(i) in self._bad}
            if bad and self.samples.policy == "stop":
                yield Decoded(plan, canvas[:0], bad)
            yield Decoded(plan, resample(canvas[index[rows]], windows[rows], flips[rows], sizes[rows], plan))

    def _decode_all(self) -> Tensor:
        """Decode every image into the top-left corner of its own canvas: (num_samples, W, H, 3) uint8."""
        height, width = self._canvas_size
        canvas = torch.zeros(
            (len(self.manifest), width, height, 3), dtype=torch.uint8, device=self.stage.device
        )
        self._bad = {}

        def decode(start: int) -> tuple[int, np.ndarray, dict[int, str]]:
            stop = min(start + _CHUNK, len(self.manifest))
            chunk = np.zeros((stop - start, width, height, 3), dtype=np.uint8)
            bad = {}
            for sample_id in range(start, stop):
                try:
                    pixels = np.asarray(open_sample(sample_id, self.samples)).transpose(1, 0, 2)
                except UnreadableError as error:
                    bad[sample_id] = str(error)
                else:
                    chunk[sample_id - start, : pixels.shape[0], : pixels.shape[1]] = pixels
            return start, chunk, bad

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for start, chunk, bad in pool.map(decode, range(0, len(self.manifest), _CHUNK)):
                canvas[start : start + len(chunk)] = torch.from_numpy(chunk).to(canvas.device)
                self._bad |= bad
        if self.samples.policy == "substitute":
            self.samples.report(self._bad)
        return canvas

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._canvas = None


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resample(images: Tensor, windows: Tensor, flips: Tensor, sizes: Tensor, plan: BatchPlan) -> Tensor:
    """Crop, resize and mirror a batch as Pillow does.

    Args:
        images: (N, W, H, 3) uint8, columns before rows, each in the top-left corner of its canvas.
        windows: (N, 4) float32 top, left, height, width.
        flips: (N,) bool.
        sizes: (N, 2) float32 raw height and width.
        plan: The same windows on the host, to get their bounds without a device sync.

    Returns:
        (N, h, w, 3) uint8.
    """
    num, width, height, _ = images.shape
    vertical = _filter(windows[:, 0], windows[:, 2], sizes[:, 0], height, plan, axis=0)
    horizontal = _filter(windows[:, 1], windows[:, 3], sizes[:, 1], width, plan, axis=1)
    horizontal = torch.where(flips[:, None, None], horizontal.flip(1), horizontal)
    columns = images.to(torch.float32).view(num, width, height * 3)
    with exact_float32():  # pixels must not depend on the TF32 and autocast switches of training
        # Like Pillow, filter along the rows first and round in between.
        narrowed = _round(torch.bmm(horizontal, columns)).view(num, plan.size[1], height, 3)
        rows = narrowed.transpose(1, 2).reshape(num, height, plan.size[1] * 3)
        result = _round(torch.bmm(vertical, rows))
    return result.to(torch.uint8).view(num, *plan.size, 3)


def _round(values: Tensor) -> Tensor:
    """Round to the nearest integer, halves up, and clip to 0 … 255."""
    return values.add_(0.5).floor_().clamp_(0, 255)


def _filter(
    start: Tensor, extent: Tensor, size: Tensor, length: int, plan: BatchPlan, *, axis: int
) -> Tensor:
    """Compute the weights of the antialiased triangle filter along one axis: (N, output, length).

    Each row sums to 1 over the pixels that the filter may see: those of the window if it is cropped first (black
    outside the image), else those of the image.
    """
    num_outputs = plan.size[axis]
    device = start.device
    # Pixels low … high − 1 cover the canvas and every window; pixels outside the canvas are cut off at the end.
    low = min(0, int(np.floor(plan.windows[:, axis].min())))
    high = max(length, int(np.ceil((plan.windows[:, axis] + plan.windows[:, axis + 2]).max())))
    # Raw pixels per output pixel (N,), centres of the output pixels in raw pixels (N, output), and half the filter's
    # width: one output pixel, but at least one raw pixel.
    scale = extent / num_outputs
    centres = start[:, None] + (torch.arange(num_outputs, device=device) + 0.5) * scale[:, None]
    reach = scale.clamp(min=1.0)[:, None, None]
    pixels = torch.arange(low, high, device=device)
    # (N, output, pixel): a triangle over each centre, zero where the filter must not reach, normalised.
    weights = (1.0 - (pixels + 0.5 - centres[:, :, None]).abs() / reach).clamp_(min=0.0)
    first, last = (start, start + extent) if plan.crop_first else (torch.zeros_like(size), size)
    seen = (pixels >= first[:, None]) & (pixels < last[:, None])
    weights = weights * seen[:, None, :]
    weights = weights / weights.sum(dim=2, keepdim=True)
    return weights[:, :, -low : length - low]
