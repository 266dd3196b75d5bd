"""Checks of the masks and boxes that figures are computed from: which are needed, and whether a split has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from explainers.measures.ground_truth import masks_by_class
from image_classification.config import ConfigError, check
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.data.targets import read_mask


def needed_annotations(manifest: Manifest, metrics: Sequence[str]) -> tuple[bool, bool]:
    """Whether batches need masks, and whether they need boxes. Mask figures fall back to boxes if masks are missing."""
    boxes = "boxes" in metrics
    masks = set(metrics) != {"boxes"}
    if masks and manifest.targets.mask_paths is None and manifest.targets.boxes is not None:
        return False, True
    return masks, boxes


def check_ground_truth(manifest: Manifest, *, masks: bool, boxes: bool) -> None:
    """Check that every image of a split has the annotations that figures need.

    Args:
        manifest: The split.
        masks, boxes: Which annotations are needed.

    Raises:
        ConfigError: The set has no such annotation, one is missing or has another size than its image, a mask names a
            class that does not exist, or a labelled class has no pixel in any mask of its images.
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
    check(not without, _listed("has no mask", without, "remove these images, or add their masks"))
    seen = _check_masks(manifest)
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
        "file per image, or take VOC or `shapes`",
    )
    assert boxes is not None
    without = [manifest.paths[index] for index, rows in enumerate(boxes) if len(rows) == 0]
    check(not without, _listed("has no box", without, "remove these images, or annotate them"))


def _check_masks(manifest: Manifest) -> set[int]:
    """Read all masks once and return the classes that occur."""
    assert manifest.targets.mask_paths is not None
    seen: set[int] = set()
    num_classes = len(manifest.class_names)
    with progress_bar("checking masks", len(manifest), True) as advance:
        for index, relative in enumerate(manifest.targets.mask_paths):
            path = manifest.root / relative
            try:
                mask = read_mask(path)
            except FileNotFoundError as error:
                raise ConfigError(f"{error}: it belongs to {manifest.paths[index]}") from None
            expected = int(manifest.heights[index]), int(manifest.widths[index])
            if mask.shape != expected and expected != (0, 0):
                raise ConfigError(
                    f"the mask {path} is {mask.shape[1]}×{mask.shape[0]} pixels, its image {manifest.paths[index]} "
                    f"{expected[1]}×{expected[0]}: masks must have the size of their images"
                )
            present = set(masks_by_class(mask))
            if present and max(present) >= num_classes:
                raise ConfigError(
                    f"the mask {path} has value {max(present) + 1}, but there are {num_classes} classes: pixels hold "
                    "class index + 1, 0 for background, 255 for void"
                )
            seen |= present
            advance(1)
    return seen


def _listed(problem: str, names: list[str], fix: str, what: str = "image") -> str:
    """Format a list of affected images: `image A has no mask (and 3 more): fix`."""
    more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
    return f"{what} {names[0] if names else ''} {problem}{more}: {fix}"
