"""Targets by sample id: class index, multi-hot, soft labels, boxes and pixel masks, through one mechanism.

A loader transports nothing but sample ids (the row in the manifest); everything that belongs to a sample is looked up
here once its crop window and flip are known. So every backend supports every kind of target, and boxes and masks follow
the crop exactly, because they use the image's own window.

Geometry. Pixel (column i, row j) covers the square [i, i+1) × [j, j+1); its centre lies at i + 0.5. A window (top,
left, height, width) in raw pixels is stretched to the output of H × W pixels, then mirrored if the sample is flipped;
this is the convention of half-pixel centres that the image's own resize uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_classification.data.imagefile import DECODING_ERRORS

VOID = 255
"""Mask value of pixels whose class is unknown or undecided."""


@dataclass(frozen=True, eq=False)
class TargetTable:
    """Targets of all samples of a split.

    Attributes:
        labels: (N,) int64 class index, or (N, L) float32 multi-hot or soft.
        boxes: Per sample (k, 4) float32 `x0, y0, x1, y1` in raw pixels, ends exclusive; None if the set has none.
        box_classes: Per sample (k,) int64 class index of each box.
        mask_paths: Per sample the path, relative to the manifest's root, of a PNG that holds class index + 1, 0 for
            background and 255 for void; "" if a sample has no mask; None if the set has none.
        multi_label: Whether the columns of (N, L) labels are independent (multi-hot) rather than a distribution.
    """

    labels: np.ndarray
    boxes: tuple[np.ndarray, ...] | None = None
    box_classes: tuple[np.ndarray, ...] | None = None
    mask_paths: tuple[str, ...] | None = None
    multi_label: bool = False

    def __post_init__(self) -> None:
        expected = np.int64 if self.labels.ndim == 1 else np.float32
        if self.labels.ndim not in (1, 2) or self.labels.dtype != expected:
            raise ValueError(
                f"labels are (N,) int64 class indices or (N, L) float32, not {self.labels.shape} {self.labels.dtype}"
            )
        if self.multi_label and self.labels.ndim != 2:
            raise ValueError("multi-label targets are (N, L) multi-hot rows, not class indices")
        if (self.boxes is None) != (self.box_classes is None):
            raise ValueError("boxes and box_classes come together")
        for name in ("boxes", "box_classes", "mask_paths"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self):
                raise ValueError(f"{name} has {len(column)} rows for {len(self)} samples")
        for boxes, classes in zip(self.boxes or (), self.box_classes or (), strict=True):
            if boxes.shape != (len(classes), 4):
                raise ValueError(f"boxes of shape {boxes.shape} for {len(classes)} box classes")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, sample_ids: np.ndarray | Sequence[int]) -> TargetTable:
        """Return the targets of some samples, in the given order."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        return TargetTable(
            labels=self.labels[ids],
            boxes=None if self.boxes is None else tuple(self.boxes[i] for i in ids),
            box_classes=None if self.box_classes is None else tuple(self.box_classes[i] for i in ids),
            mask_paths=None if self.mask_paths is None else tuple(self.mask_paths[i] for i in ids),
            multi_label=self.multi_label,
        )

    def renumbered(self, places: Sequence[int], num_classes: int) -> TargetTable:
        """Return the same targets with class i renumbered to `places[i]`, of `num_classes` classes.

        Raises:
            ValueError: There are pixel masks, whose files hold the class indices.
        """
        if list(places) == list(range(num_classes)):
            return self
        if self.mask_paths is not None:
            raise ValueError(
                "its masks hold class indices of another order: give the data that it was trained on"
            )
        order = np.asarray(places, dtype=np.int64)
        if self.labels.ndim == 1:
            labels = order[self.labels]
        else:
            labels = np.zeros((len(self), num_classes), np.float32)
            labels[:, order] = self.labels
        classes = None if self.box_classes is None else tuple(order[each] for each in self.box_classes)
        return TargetTable(labels, self.boxes, classes, None, self.multi_label)

    def as_multi_label(self, num_classes: int) -> TargetTable:
        """Convert class indices to multi-hot rows with a single one; multi-label targets are returned unchanged.

        Raises:
            ValueError: The labels are soft: a distribution has no multi-hot form.
        """
        if self.multi_label:
            return self
        if self.labels.ndim == 2:
            raise ValueError("soft labels cannot become multi-label targets")
        rows = np.zeros((len(self), num_classes), np.float32)
        rows[np.arange(len(self)), self.labels] = 1.0
        return TargetTable(rows, self.boxes, self.box_classes, self.mask_paths, multi_label=True)

    def lookup(self, sample_ids: np.ndarray | Sequence[int]) -> Tensor:
        """Return the labels of a batch: (n,) int64, or (n, L) float32."""
        return torch.from_numpy(self.labels[np.asarray(sample_ids, dtype=np.int64)])

    def boxes_in(
        self,
        sample_ids: np.ndarray | Sequence[int],
        windows: np.ndarray,
        flips: np.ndarray,
        size: tuple[int, int],
        *,
        clip: bool = False,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the boxes of a batch in pixels of the output crop.

        Args:
            sample_ids: (n,) rows of the table.
            windows: (n, 4) float top, left, height, width in raw pixels.
            flips: (n,) bool.
            size: Output height and width.
            clip: Clip the boxes at the crop's border. A box outside the crop then has no area; it is kept, so that the
                rows of both forms correspond. Figures that divide by the whole area need unclipped boxes.

        Returns:
            Per sample (k, 4) float32 `x0, y0, x1, y1` and (k,) int64 classes.

        Raises:
            ValueError: The set has no boxes.
        """
        if self.boxes is None or self.box_classes is None:
            raise ValueError("this data set has no boxes")
        height, width = size
        results = []
        for sample, (top, left, rows, columns), flip in zip(sample_ids, windows, flips, strict=True):
            # x and y are (k, 2): the two edges of each box, moved into the window and scaled to the output.
            x = (self.boxes[sample][:, 0::2].astype(np.float64) - left) * (width / columns)
            y = (self.boxes[sample][:, 1::2].astype(np.float64) - top) * (height / rows)
            if flip:
                x = width - x[:, ::-1]
            if clip:
                x, y = x.clip(0, width), y.clip(0, height)
            corners = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1).astype(np.float32)
            results.append((torch.from_numpy(corners), torch.from_numpy(self.box_classes[sample])))
        return results

    def masks_in(
        self,
        root: Path,
        sample_ids: np.ndarray | Sequence[int],
        windows: np.ndarray,
        flips: np.ndarray,
        size: tuple[int, int],
    ) -> Tensor:
        """Return the masks of a batch in pixels of the output crop, by nearest neighbour (arguments as for `boxes_in`).

        Returns:
            (n, H, W) uint8: class index + 1, 0 background (also where the window leaves the image), 255 void; a sample
                without a mask is void everywhere, since its pixels are unknown.

        Raises:
            ValueError: The set has no masks, or a file is not a mask; the message names it.
        """
        if self.mask_paths is None:
            raise ValueError("this data set has no masks")
        batch = np.full((len(sample_ids), *size), VOID, np.uint8)
        for row, (sample, window, flip) in enumerate(zip(sample_ids, windows, flips, strict=True)):
            relative = self.mask_paths[sample]
            if relative:
                batch[row] = crop_mask(read_mask(root / relative), window, bool(flip), size)
        return torch.from_numpy(batch)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return plain arrays for an npz file without pickles; ragged columns as one array and its row lengths."""
        arrays = {"labels": self.labels, "multi_label": np.array(self.multi_label)}
        if self.boxes is not None and self.box_classes is not None:
            arrays["box_counts"] = np.array([len(boxes) for boxes in self.boxes], np.int64)
            arrays["boxes"] = np.concatenate([np.zeros((0, 4), np.float32), *self.boxes])
            arrays["box_classes"] = np.concatenate([np.zeros(0, np.int64), *self.box_classes])
        if self.mask_paths is not None:
            arrays["mask_paths"] = np.array(self.mask_paths, dtype=np.str_)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> TargetTable:
        """Build a table from the output of `to_arrays`."""
        boxes = box_classes = None
        if "box_counts" in arrays:
            cuts = np.cumsum(arrays["box_counts"])[:-1]
            num_rows = len(arrays["box_counts"])
            boxes = tuple(np.split(arrays["boxes"], cuts)) if num_rows else ()
            box_classes = tuple(np.split(arrays["box_classes"], cuts)) if num_rows else ()
        masks = tuple(arrays["mask_paths"].tolist()) if "mask_paths" in arrays else None
        return cls(arrays["labels"], boxes, box_classes, masks, bool(arrays["multi_label"]))


def read_mask(path: Path) -> np.ndarray:
    """Read the stored indices of a mask PNG: (H, W) uint8, palette or grey, never through its colours.

    Raises:
        ValueError: The file is not an image with one 8-bit channel.
        FileNotFoundError: The file does not exist.
    """
    if path.exists() and not path.is_file():  # reading a named pipe would block
        raise ValueError(f"{path}: the mask is no regular file")
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"the mask {path} is missing") from None
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: the mask cannot be decoded ({error})") from error
    if mode not in ("P", "L"):
        raise ValueError(f"{path}: a mask has one 8-bit channel (palette or grey), not mode {mode!r}")
    return mask


def crop_mask(mask: np.ndarray, window: np.ndarray, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Crop a window (top, left, height, width) of an (H, W) mask at output `size` by nearest neighbour.

    Output pixel j takes the raw pixel that holds its centre, `floor(left + (j + 0.5)·width/W)`; pixels outside are 0.
    """
    top, left, rows, columns = (float(value) for value in window)
    y = np.floor(top + (np.arange(size[0]) + 0.5) * (rows / size[0])).astype(np.int64)
    x = np.floor(left + (np.arange(size[1]) + 0.5) * (columns / size[1])).astype(np.int64)
    if flip:
        x = x[::-1]
    inside = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))[None, :]
    nearest = mask[y.clip(0, mask.shape[0] - 1)[:, None], x.clip(0, mask.shape[1] - 1)[None, :]]
    return np.where(inside, nearest, 0).astype(np.uint8)
