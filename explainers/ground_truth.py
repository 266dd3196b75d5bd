"""Where objects are: masks or boxes of a split, checked before anything is computed, and per picture and class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from explainers.localization import boxes_to_mask
from image_classification.config import ConfigError, check
from image_classification.data.loader import Batch
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.data.targets import VOID, read_mask


@dataclasses.dataclass(frozen=True)
class Annotated:
    """What is known about one picture of a batch, in the pixels of the network's input.

    Attributes:
        row: Its place in the batch.
        labels: Classes that its target names.
        masks: Pixel mask (H, W) bool by class that occurs in it. Undecided (void) pixels count as background.
        boxes: (k, 4) `x0, y0, x1, y1` by class, not clipped; empty without boxes.
    """

    row: int
    labels: tuple[int, ...]
    masks: dict[int, NDArray[np.bool_]]
    boxes: dict[int, NDArray[np.float64]]


def annotated(batch: Batch) -> Iterator[Annotated]:
    """The ground truth of a batch's pictures. Where there are boxes but no masks, boxes serve as masks."""
    targets = batch.targets.cpu()
    for row in range(len(batch)):
        boxes: dict[int, NDArray[np.float64]] = {}
        if batch.boxes is not None:
            corners, classes = (part.numpy() for part in batch.boxes[row])
            boxes = {int(c): corners[classes == c].astype(np.float64) for c in np.unique(classes)}
        if batch.masks is not None:
            picture = batch.masks[row].numpy()
            masks = {int(v) - 1: picture == v for v in np.unique(picture) if v not in (0, VOID)}
        else:
            size = batch.images.shape[-2], batch.images.shape[-1]
            masks = {c: boxes_to_mask(corners, size) for c, corners in boxes.items()}
            masks = {c: mask for c, mask in masks.items() if mask.any()}
        label = targets[row]
        labels = (int(label),) if label.dim() == 0 else tuple(label.gt(0.5).nonzero()[:, 0].tolist())
        yield Annotated(row, labels, masks, boxes)


def check_ground_truth(manifest: Manifest, *, masks: bool, boxes: bool, progress: bool = True) -> None:
    """Make sure that every picture of a split has what figures will be computed from.

    Args:
        manifest: The split.
        masks, boxes: What is needed.
        progress: Show a bar.

    Raises:
        ConfigError: The set has no such annotation, one is missing or has another size than its picture, a mask names a
            class that does not exist, or a class that pictures are labelled with has no pixel in any of their masks.
    """
    table = manifest.targets
    if boxes:
        _check_boxes(manifest)
    if not masks:
        return
    check(
        table.mask_paths is not None,
        f"the split {manifest.split!r} has no pixel masks, which these figures need: take VOC with segmentations or "
        "`shapes`, or give boxes with --annotation-path",
    )
    assert table.mask_paths is not None
    without = [manifest.paths[index] for index, path in enumerate(table.mask_paths) if not path]
    check(not without, _listed("has no mask", without, "remove these pictures, or add their masks"))
    seen = _check_masks(manifest, progress)
    if table.labels.ndim == 1:
        labelled = set(np.unique(table.labels).tolist())
    else:
        labelled = set(np.flatnonzero((table.labels > 0.5).any(axis=0)).tolist())
    absent = [manifest.class_names[index] for index in sorted(labelled - seen)]
    check(
        not absent, _listed("has no pixel in any mask", absent, "the masks belong to other classes", "class")
    )


def _check_boxes(manifest: Manifest) -> None:
    boxes = manifest.targets.boxes
    check(
        boxes is not None,
        f"the split {manifest.split!r} has no boxes, which these figures need: give --annotation-path DIR with one XML "
        "file per picture, or take VOC or `shapes`",
    )
    assert boxes is not None
    without = [manifest.paths[index] for index, rows in enumerate(boxes) if len(rows) == 0]
    check(not without, _listed("has no box", without, "remove these pictures, or annotate them"))


def _check_masks(manifest: Manifest, progress: bool) -> set[int]:
    """Read all masks once; the classes that occur."""
    assert manifest.targets.mask_paths is not None
    seen: set[int] = set()
    num_classes = len(manifest.class_names)
    with progress_bar("checking masks", len(manifest), progress) as advance:
        for index, relative in enumerate(manifest.targets.mask_paths):
            path = manifest.root / relative
            try:
                mask = read_mask(path)
            except FileNotFoundError as error:
                raise ConfigError(f"{error}: it belongs to {manifest.paths[index]}") from None
            expected = int(manifest.heights[index]), int(manifest.widths[index])
            if mask.shape != expected and expected != (0, 0):
                raise ConfigError(
                    f"the mask {path} is {mask.shape[1]}×{mask.shape[0]} pixels, its picture {manifest.paths[index]} "
                    f"{expected[1]}×{expected[0]}: masks must have the size of their pictures"
                )
            present = {int(value) - 1 for value in np.unique(mask) if value not in (0, VOID)}
            if present and max(present) >= num_classes:
                raise ConfigError(
                    f"the mask {path} has value {max(present) + 1}, but there are {num_classes} classes: pixels hold "
                    "class index + 1, 0 for background, 255 for void"
                )
            seen |= present
            advance(1)
    return seen


def _listed(problem: str, names: list[str], fix: str, what: str = "picture") -> str:
    """`picture A has no mask (and 3 more): fix`."""
    more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
    return f"{what} {names[0] if names else ''} {problem}{more}: {fix}"
