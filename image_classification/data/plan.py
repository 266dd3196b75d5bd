"""The data plan: the samples of a batch and the crop of each, as a pure function of their coordinates.

Order is a function of (seed, epoch); window, flip and automatic augmentation of (seed, epoch, sample id). Backends only
execute the plan, so the pixels of a sample depend neither on the backend nor on batch size, rank, number of workers or
restarts: two ranks of B samples see what one rank of 2B sees, or one rank of B that accumulates twice.

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
_ORDERING = threading.Lock()  # prefetching threads share a planner with the consumer


@dataclass(frozen=True)
class BatchPlan:
    """The content of a rank's batch.

    Attributes:
        epoch, step: Position of the batch; the step counts global batches.
        sample_ids: (N,) int64 rows of the manifest.
        windows: (N, 4) float64 top, left, height, width in raw pixels.
        flips: (N,) bool, mirrored left to right after the resize.
        size: Output height and width.
        crop_first: True: the window (of whole pixels) is cropped and then resized, so the filter sees nothing beyond
            it. False: the image is resized and then cropped; the filter sees the surroundings of the window.
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
        """Return rows start to stop as a separate plan, for another step."""
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
    """Maps raw sizes and uniform random numbers to windows."""

    @property
    def size(self) -> tuple[int, int]:
        """Output height and width."""
        ...

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers per window."""
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
        """Return windows (N, 4) for raw sizes (N,) and (N, num_uniforms) numbers in [0, 1)."""
        ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random area and aspect ratio, the training geometry of ImageNet.

    As in torchvision: ten tries for a window that fits; else the largest central window with an allowed ratio.
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
        # Each row takes its first window that fits, at a random position; the central one if none of the ten fits.
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
        """Return the size of the largest central window with an allowed aspect ratio, at least one pixel each way."""
        low, high = self.ratio
        too_narrow, too_wide = widths / heights < low, widths / heights > high
        height = np.where(too_narrow, np.minimum(np.rint(widths / low), heights), heights)
        width = np.where(too_wide, np.minimum(np.rint(heights * high), widths), widths)
        return np.maximum(height, 1.0), np.maximum(width, 1.0)


@dataclass(frozen=True)
class PadCrop:
    """The image shifted by up to `pad` output pixels, black outside: the training geometry of CIFAR.

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
    """Short side resized to `resize`, centre cropped: evaluation as with torchvision's Resize and CenterCrop.

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
        # torchvision truncates the long side: int(size * long / short).
        resized_height = np.where(tall, np.floor(self.resize * heights / widths), self.resize)
        resized_width = np.where(tall, self.resize, np.floor(self.resize * widths / heights))
        top = np.rint((resized_height - self.size[0]) / 2)
        left = np.rint((resized_width - self.size[1]) / 2)
        per_row, per_column = heights / resized_height, widths / resized_width
        height, width = self.size[0] * per_row, self.size[1] * per_column
        # Rounding must not move the window slightly out of the image.
        top = np.clip(top * per_row, 0, np.maximum(heights - height, 0))
        left = np.clip(left * per_column, 0, np.maximum(widths - width, 0))
        return np.stack([top, left, height, width], axis=1)


@dataclass(frozen=True)
class WholeImage:
    """The whole image, stretched to the output's size."""

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

    Global batch g of an epoch is `order[g·B·W : (g+1)·B·W]`, of which rank r has the contiguous slice r. Training drops
    the last, incomplete global batch. Otherwise every sample occurs exactly once over all ranks: the last batches may
    be short or empty.

    Args:
        heights, widths: (N,) raw sizes; 0 where unknown.
        geometry: Source of windows.
        batch_size: B, per rank.
        seed: Seed of order, windows, flips and operations.
        training: Shuffle every epoch, drop the incomplete batch, and continue from epoch to epoch without end.
        shuffle: Shuffle by seed and epoch even outside training.
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
        """Yield (epoch, step) from a position on: to the epoch's end, or, in training, through all later epochs."""
        while True:
            for current in range(step, self.num_steps):
                yield epoch, current
            if not self.training:
                return
            epoch, step = epoch + 1, 0

    def ids(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the sample ids of this rank's batch: (N,), N ≤ B."""
        start = step * self.global_batch + self.rank * self.batch_size
        stop = min(start + self.batch_size, self.num_samples)
        if not self.shuffle:
            return np.arange(start, max(stop, start), dtype=np.int64)
        return self._order(epoch)[start:stop]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch in order. Two epochs are cached, since a prefetching reader may be in the next
        one.
        """
        with _ORDERING:
            if epoch not in self._orders:
                self._orders = {other: self._orders[other] for other in sorted(self._orders)[-1:]}
                self._orders[epoch] = permutation(self.seed, epoch, self.num_samples)
            return self._orders[epoch]

    def batch(self, epoch: int, step: int) -> BatchPlan:
        """Return the plan of this rank's batch."""
        return self.plan(epoch, step, self.ids(epoch, step))

    def plan(self, epoch: int, step: int, sample_ids: NDArray[np.int64]) -> BatchPlan:
        """Return a plan for given samples; each row is a function of (seed, epoch, sample id) alone."""
        geometry = self.geometry
        # A sample of unknown size is never decoded, but its window must be computable.
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
        """Leave out the order of whole epochs: workers get plans with their sample ids."""
        return {**self.__dict__, "_orders": {}}
