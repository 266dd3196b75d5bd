"""Ground truth of a batch: masks and boxes per image and class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from explainers.measures.localization import boxes_to_mask
from image_classification.data.loader import Batch
from image_classification.data.targets import VOID


@dataclasses.dataclass(frozen=True)
class Annotated:
    """Annotations of one image of a batch, in pixels of the network's input.

    Attributes:
        row: Its index in the batch.
        labels: Classes that its target names.
        masks: Pixel mask (H, W) bool by class present in the image. Undecided (void) pixels count as background.
        boxes: (k, 4) `x0, y0, x1, y1` by class, not clipped; empty without boxes.
    """

    row: int
    labels: tuple[int, ...]
    masks: dict[int, NDArray[np.bool_]]
    boxes: dict[int, NDArray[np.float64]]


def annotated(batch: Batch) -> Iterator[Annotated]:
    """Yield the ground truth of a batch's images. Without masks, boxes serve as masks."""
    targets = batch.targets.cpu()
    size = batch.images.shape[-2], batch.images.shape[-1]
    for row in range(len(batch)):
        boxes = _boxes_by_class(batch, row)
        if batch.masks is not None:
            masks = masks_by_class(batch.masks[row].numpy())
        else:
            drawn = {label: boxes_to_mask(corners, size) for label, corners in boxes.items()}
            masks = {label: mask for label, mask in drawn.items() if mask.any()}
        label = targets[row]
        labels = (int(label),) if label.dim() == 0 else tuple(label.gt(0.5).nonzero()[:, 0].tolist())
        yield Annotated(row, labels, masks, boxes)


def _boxes_by_class(batch: Batch, row: int) -> dict[int, NDArray[np.float64]]:
    if batch.boxes is None:
        return {}
    corners, classes = (part.numpy() for part in batch.boxes[row])
    return {int(label): corners[classes == label].astype(np.float64) for label in np.unique(classes)}


def masks_by_class(image: NDArray[np.integer]) -> dict[int, NDArray[np.bool_]]:
    """Split an (H, W) image of class index + 1 (0 for background, 255 for void) into pixel masks (H, W) by class."""
    values = [int(value) for value in np.unique(image) if value not in (0, VOID)]
    return {value - 1: image == value for value in values}
