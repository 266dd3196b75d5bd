"""The data plan: which samples make a batch and what is cut out of each, as a pure function of its coordinates.

Order is a function of (seed, epoch); window, flip and automatic augmentation of (seed, epoch, sample id). Backends
only execute the plan, so the pixels of a sample depend neither on the backend nor on batch size, rank, number of
workers or restarts: two ranks of B samples see what one rank of 2B sees, or one rank of B that accumulates twice.

Windows are (top, left, height, width) in raw pixels and may leave the image, which is black there. Geometry of
training: Szegedy et al., Going Deeper with Convolutions (CVPR 2015), with torchvision's ten tries; He et al., Deep
Residual Learning (CVPR 2016), section 4.2, for CIFAR.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from image_classification.config import check_setting
from image_classification.data.augment import Operations, Policy
from image_classification.data.philox import Stream, permutation, uniforms

Floats = NDArray[np.float64]
_ORDERING = threading.Lock()  # threads that read ahead share a planner with the consumer


@dataclass(frozen=True)
class BatchPlan:
    """What a rank's batch is made of.

    Attributes:
        epoch, step: Place of the batch; the step counts global batches.
        sample_ids: (N,) int64 rows of the manifest.
        windows: (N, 4) float64 top, left, height, width in raw pixels.
        flips: (N,) bool, mirrored left to right after the resize.
        size: Output height and width.
        crop_first: True: the window (of whole pixels) is cut out and then resized, so that the filter sees nothing
            beyond it. False: the image is resized and then cropped; the filter sees what lies around the window.
        operations: Automatic augmentation, or None.
    """

    epoch: int
    step: int
    sample_ids: NDArray[np.int64]
    windows: Floats
    flips: NDArray[np.bool_]
    size: tuple[int, int]
    crop_first: bool
    operations: Operations | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def rows(self, start: int, stop: int, step: int) -> BatchPlan:
        """Rows start to stop as a plan of their own, for another step."""
        index = slice(start, stop)
        operations = None if self.operations is None else self.operations.rows(index)
        return replace(
            self,
            step=step,
            sample_ids=self.sample_ids[index],
            windows=self.windows[index],
            flips=self.flips[index],
            operations=operations,
        )


class Geometry(Protocol):
    """Turns raw sizes and uniform numbers into windows."""

    @property
    def size(self) -> tuple[int, int]:
        """Output height and width."""
        ...

    @property
    def num_uniforms(self) -> int:
        """Uniform numbers that a window needs."""
        ...

    @property
    def crop_first(self) -> bool:
        """See `BatchPlan.crop_first`."""
        ...

    @property
    def inside(self) -> bool:
        """Whether windows never leave the image."""
        ...

    @property
    def flip(self) -> bool:
        """Whether half of the images are mirrored."""
        ...

    def windows(self, heights: Floats, widths: Floats, numbers: Floats) -> Floats:
        """(N, 4) windows for (N,) raw sizes and (N, num_uniforms) numbers in [0, 1)."""
        ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random area and aspect ratio, the training geometry of ImageNet.

    As torchvision: ten tries for a window that fits; else the largest central one whose ratio is within bounds.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    crop_first = True
    inside = True
    num_tries = 10
    num_uniforms = 2 * num_tries + 2

    def windows(self, heights: Floats, widths: Floats, numbers: Floats) -> Floats:
        """See `Geometry.windows`."""
        tries = self.num_tries
        area = (heights * widths)[:, None]
        target = area * (self.scale[0] + numbers[:, :tries] * (self.scale[1] - self.scale[0]))
        log_low, log_high = np.log(self.ratio)
        ratio = np.exp(log_low + numbers[:, tries : 2 * tries] * (log_high - log_low))
        tried_width = np.rint(np.sqrt(target * ratio))
        tried_height = np.rint(np.sqrt(target / ratio))
        fits_across = (tried_width > 0) & (tried_width <= widths[:, None])
        fits_down = (tried_height > 0) & (tried_height <= heights[:, None])
        fits = fits_across & fits_down
        # Each row takes its first window that fits, at a random place; the central one where none of ten fits.
        first = fits.argmax(axis=1)
        rows = np.arange(len(heights))
        central_height, central_width = self._central(heights, widths)
        found = fits[rows, first]
        height = np.where(found, tried_height[rows, first], central_height)
        width = np.where(found, tried_width[rows, first], central_width)
        random_top = np.floor(numbers[:, -2] * (heights - height + 1))
        random_left = np.floor(numbers[:, -1] * (widths - width + 1))
        top = np.where(found, random_top, (heights - height) // 2)
        left = np.where(found, random_left, (widths - width) // 2)
        return np.stack([top, left, height, width], axis=1)

    def _central(self, heights: Floats, widths: Floats) -> tuple[Floats, Floats]:
        """Size of the largest central window within the bounds of the aspect ratio, at least one pixel each way."""
        low, high = self.ratio
        too_narrow, too_wide = widths / heights < low, widths / heights > high
        height = np.where(too_narrow, np.minimum(np.rint(widths / low), heights), heights)
        width = np.where(too_wide, np.minimum(np.rint(heights * high), widths), widths)
        return np.maximum(height, 1.0), np.maximum(width, 1.0)


@dataclass(frozen=True)
class PadCrop:
    """The image shifted by up to `pad` output pixels, black where it ends: the training geometry of CIFAR.

    An image of another size than the output is shifted by the corresponding whole number of raw pixels.
    """

    size: tuple[int, int]
    pad: int = 4
    flip: bool = True
    crop_first = True
    inside = False
    num_uniforms = 2

    def windows(self, heights: Floats, widths: Floats, numbers: Floats) -> Floats:
        """See `Geometry.windows`."""
        shifts = np.floor(numbers * (2 * self.pad + 1)) - self.pad
        top = np.rint(shifts[:, 0] * heights / self.size[0])
        left = np.rint(shifts[:, 1] * widths / self.size[1])
        return np.stack([top, left, heights, widths], axis=1)


@dataclass(frozen=True)
class CentreCrop:
    """The short side resized to `resize`, the centre cut out: evaluation as torchvision's Resize and CenterCrop.

    The window reproduces torchvision's rounding of the resized size and of the crop's offset.
    """

    size: tuple[int, int]
    resize: int
    flip: bool = False
    crop_first = False
    inside = True
    num_uniforms = 0

    def __post_init__(self) -> None:
        problem = f"smaller than the image size {max(self.size)}: raise it"
        check_setting(self.resize >= max(self.size), "resize", self.resize, problem)

    def windows(self, heights: Floats, widths: Floats, numbers: Floats) -> Floats:
        """See `Geometry.windows`."""
        tall = widths <= heights
        # torchvision truncates the long side: int(size * long / short)
        resized_height = np.where(tall, np.floor(self.resize * heights / widths), self.resize)
        resized_width = np.where(tall, self.resize, np.floor(self.resize * widths / heights))
        top = np.rint((resized_height - self.size[0]) / 2)
        left = np.rint((resized_width - self.size[1]) / 2)
        per_row, per_column = heights / resized_height, widths / resized_width
        height, width = self.size[0] * per_row, self.size[1] * per_column
        # rounding must not carry the window a hair out of the image
        top = np.clip(top * per_row, 0, np.maximum(heights - height, 0))
        left = np.clip(left * per_column, 0, np.maximum(widths - width, 0))
        return np.stack([top, left, height, width], axis=1)


@dataclass(frozen=True)
class WholeImage:
    """Everything, stretched to the output's size."""

    size: tuple[int, int]
    flip: bool = False
    crop_first = False
    inside = True
    num_uniforms = 0

    def windows(self, heights: Floats, widths: Floats, numbers: Floats) -> Floats:
        """See `Geometry.windows`."""
        zeros = np.zeros_like(heights)
        return np.stack([zeros, zeros, heights, widths], axis=1)


class Planner:
    """The plan of one split on one rank.

    Global batch g of an epoch is `order[g·B·W : (g+1)·B·W]`, of which rank r has the contiguous slice r. Training
    drops the last, incomplete global batch. Otherwise every sample comes exactly once over all ranks: the last
    batches may be short or empty.

    Args:
        heights, widths: (N,) raw sizes; 0 where unknown.
        geometry: Where windows come from.
        batch_size: B, per rank.
        seed: Of order, windows, flips and operations.
        training: Shuffled again every epoch, the incomplete batch dropped, epochs following each other without end.
        shuffle: Order by seed and epoch although it is not training.
        policy: Automatic augmentation.
        rank, world_size: r and W.

    Raises:
        SettingError: Training has fewer samples than a global batch.
    """

    def __init__(
        self,
        heights: NDArray[np.int32],
        widths: NDArray[np.int32],
        geometry: Geometry,
        *,
        batch_size: int,
        seed: int = 0,
        training: bool = False,
        shuffle: bool = False,
        policy: Policy | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_setting(batch_size >= 1, "batch_size", batch_size, "give 1 or more images")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size}")
        self.heights = heights
        self.widths = widths
        self.geometry = geometry
        self.policy = policy
        self.batch_size = batch_size
        self.seed = seed
        self.training = training
        self.shuffle = shuffle or training
        self.rank = rank
        self.world_size = world_size
        self.global_batch = batch_size * world_size
        self.num_samples = len(heights)
        full, rest = divmod(self.num_samples, self.global_batch)
        self.num_steps = full if training else full + (rest > 0)
        self._orders: dict[int, NDArray[np.int64]] = {}
        problem = (
            f"the training set has {self.num_samples} samples, fewer than one global batch of {self.global_batch} "
            f"({world_size} × {batch_size}): lower it"
        )
        check_setting(full > 0 or not training, "batch_size", batch_size, problem)

    def positions(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """(epoch, step) from there on: to the epoch's end, or, in training, on through all later epochs."""
        while True:
            for current in range(step, self.num_steps):
                yield epoch, current
            if not self.training:
                return
            epoch, step = epoch + 1, 0

    def ids(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The sample ids of this rank's batch: (N,), N ≤ B."""
        start = step * self.global_batch + self.rank * self.batch_size
        stop = min(start + self.batch_size, self.num_samples)
        if not self.shuffle:
            return np.arange(start, max(stop, start), dtype=np.int64)
        return self._order(epoch)[start:stop]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch in order. Two epochs are kept: a reader that is ahead is in the next one already."""
        with _ORDERING:
            if epoch not in self._orders:
                self._orders = {other: self._orders[other] for other in sorted(self._orders)[-1:]}
                self._orders[epoch] = permutation(self.seed, epoch, self.num_samples)
            return self._orders[epoch]

    def batch(self, epoch: int, step: int) -> BatchPlan:
        """The plan of this rank's batch."""
        return self.plan(epoch, step, self.ids(epoch, step))

    def plan(self, epoch: int, step: int, sample_ids: NDArray[np.int64]) -> BatchPlan:
        """A plan for given samples; each row is a function of (seed, epoch, sample id) alone."""
        geometry = self.geometry
        # a sample of unknown size is never decoded, but its window must be computable
        heights = np.maximum(self.heights[sample_ids], 1).astype(np.float64)
        widths = np.maximum(self.widths[sample_ids], 1).astype(np.float64)
        windows = geometry.windows(
            heights, widths, self._draw(Stream.WINDOW, epoch, sample_ids, geometry.num_uniforms)
        )
        flips = np.zeros(len(sample_ids), dtype=bool)
        if geometry.flip:
            flips = self._draw(Stream.FLIP, epoch, sample_ids, 1)[:, 0] < 0.5
        operations = None
        if self.policy is not None:
            operations = self.policy.choose(
                self._draw(Stream.AUGMENT, epoch, sample_ids, self.policy.num_uniforms)
            )
        return BatchPlan(
            epoch, step, sample_ids, windows, flips, geometry.size, geometry.crop_first, operations
        )

    def _draw(self, stream: Stream, epoch: int, sample_ids: NDArray[np.int64], count: int) -> Floats:
        if count == 0:
            return np.empty((len(sample_ids), 0))
        return uniforms(self.seed, stream, epoch, sample_ids, count)

    def __getstate__(self) -> dict[str, object]:
        """Workers get plans with their sample ids, not the order of a whole epoch."""
        return {**self.__dict__, "_orders": {}}
