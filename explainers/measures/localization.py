"""Figures of how well a heat-map localises an object, for one map and one ground truth.

Against a pixel mask (Park et al. 2020, section 4): pointing game, ROC-AUC, energy inside. Against boxes (Zolna et al.
2020, "Classifier-agnostic saliency map extraction"): F1, F1a, LE, OM from the map binarised at the quantile that its
own mean gives. All functions are pure, on NumPy arrays; an undefined figure is NaN.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage  # comes with scikit-learn
from sklearn.metrics import roc_auc_score

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
_FOUR_CONNECTED = ndimage.generate_binary_structure(2, 1)
_TINY = 1e-6


def pointing_hit(heatmap: Array, mask: Mask, tolerance: int = 0) -> bool:
    """Whether the highest pixel (the first of several, row by row) lies on the object.

    Args:
        heatmap: (H, W) without NaN.
        mask: (H, W), the object's pixels; an empty mask has no hit.
        tolerance: Also count a hit within this distance of the object, in pixels (Zhang et al. 2016: 15).
    """
    row, column = np.unravel_index(int(np.argmax(heatmap)), heatmap.shape)
    if tolerance == 0:
        return bool(mask[row, column])
    rows, columns = np.nonzero(mask)
    distances = (rows - row) ** 2 + (columns - column) ** 2
    return bool(np.any(distances <= tolerance**2))


def pixel_auc(heatmap: Array, mask: Mask) -> float:
    """Return the area under the ROC curve of the map as a classifier of pixels; ties count half.

    It depends on the order of pixels only, so normalising the map first would change nothing.

    Returns:
        NaN if the mask is empty or covers every pixel.
    """
    if not mask.any() or mask.all():
        return math.nan
    return float(roc_auc_score(mask.ravel(), heatmap.ravel()))


def energy_inside(heatmap: Array, mask: Mask) -> float:
    """Return the share of the map's positive part on the object (Wang et al. 2020); NaN if the map has no positive
    part.
    """
    positive = np.clip(heatmap, 0, None, dtype=np.float64)
    energy = positive.sum()
    return float(positive[mask].sum() / energy) if energy > 0 else math.nan


def as_saliency(heatmap: Array) -> Array:
    """Convert a heat-map to a saliency mask in [0, 1]: its positive part over its maximum (all 0 if nothing is
    positive).
    """
    positive: Array = np.clip(heatmap, 0, None, dtype=np.float64)
    highest = positive.max()
    if highest > 0:
        positive = positive / highest
    return positive


def saliency_threshold(saliency: Array) -> float:
    """Return CASM's threshold for a saliency mask: the mean μ of the mask is the share of pixels to keep.

    The k-th smallest value, k = 1 + ⌊(n − 1)(1 − μ) + ½⌋, clipped to [1e-6, 1 − 1e-6]; pixels strictly above it are
    kept.

    Args:
        saliency: (H, W) in [0, 1].
    """
    count = saliency.size
    k = 1 + math.floor((count - 1) * (1 - float(saliency.mean(dtype=np.float64))) + 0.5)
    value = float(np.partition(saliency, k - 1, axis=None)[k - 1])
    return min(max(value, _TINY), 1 - _TINY)


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """Pixels of rows top … bottom − 1 and columns left … right − 1."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        """Number of pixels; 0 for an empty rectangle."""
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)

    def clipped(self, height: int, width: int) -> Rectangle:
        """Return the part within an image."""
        return Rectangle(
            min(max(self.left, 0), width),
            min(max(self.top, 0), height),
            min(max(self.right, 0), width),
            min(max(self.bottom, 0), height),
        )

    def overlap(self, other: Rectangle) -> int:
        """Return the number of pixels in both rectangles."""
        return Rectangle(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        ).area

    def of(self, image: Array) -> Array:
        """The rectangle's part of an (H, W) array; the rectangle must lie within it."""
        return image[self.top : self.bottom, self.left : self.right]


EMPTY = Rectangle(0, 0, 0, 0)


def object_rectangle(saliency: Array) -> Rectangle:
    """Return the tight box around the largest 4-connected region above `saliency_threshold`.

    Of several largest regions, the one that begins first, row by row, is taken. Returns `EMPTY` if no pixel is kept (a
    constant mask).
    """
    labels, count = ndimage.label(saliency > saliency_threshold(saliency), structure=_FOUR_CONNECTED)
    if count == 0:
        return EMPTY
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    rows, columns = ndimage.find_objects(labels)[int(np.argmax(sizes)) - 1]
    return Rectangle(columns.start, rows.start, columns.stop, rows.stop)


@dataclasses.dataclass(frozen=True)
class BoxFigures:
    """CASM's figures of one image.

    Attributes:
        f1: F1 of the best box.
        f1_mean: Mean F1 over the boxes (F1a).
        located: Whether some box overlaps the map's rectangle with IoU > 0.5. LE = 1 − located, OM = 1 − located ·
            correct.
        best_iou: The highest IoU over the boxes.
    """

    f1: float
    f1_mean: float
    located: bool
    best_iou: float


def box_figures(saliency: Array, boxes: Array, found: Rectangle | None = None) -> BoxFigures:
    """Compare a saliency mask with ground-truth boxes.

    Corners are truncated to whole pixels. A box counts with its full area, also beyond the image's border; a box that
    lies outside the image, or has no area after truncation, scores 0.

    Args:
        saliency: (H, W) in [0, 1].
        boxes: (k, 4) `x0, y0, x1, y1` in pixels, ends exclusive, not clipped; k ≥ 1.
        found: Predicted location of the object; None for `object_rectangle` of the mask.

    Raises:
        ValueError: There is no box.
    """
    if len(boxes) == 0:
        raise ValueError("an image without boxes has no box figures; leave it out")
    found = object_rectangle(saliency) if found is None else found
    scores, overlaps = [], []
    for x0, y0, x1, y1 in boxes:
        box = Rectangle(int(x0), int(y0), int(x1), int(y1))
        visible = box.clipped(*saliency.shape)
        scores.append(_f1(saliency, visible, box.area))
        shared = found.overlap(visible)
        union = found.area + box.area - shared
        overlaps.append(shared / union if union else 0.0)
    best = max(overlaps)
    return BoxFigures(max(scores), float(np.mean(scores)), best > 0.5, best)


def _f1(saliency: Array, visible: Rectangle, full_area: int) -> float:
    """Return 2Pr/(P + r + 1e-6) with P = Σ_in s/(Σ s + 1e-6), r = Σ_in s/A."""
    if full_area == 0:
        return 0.0
    inside = float(visible.of(saliency).sum(dtype=np.float64))
    precision = inside / (float(saliency.sum(dtype=np.float64)) + _TINY)
    recall = inside / full_area
    return 2 * precision * recall / (precision + recall + _TINY)


def boxes_to_mask(boxes: Array, shape: tuple[int, int]) -> Mask:
    """Return the union of boxes `x0, y0, x1, y1` as a pixel mask: pixels whose centre lies in a box."""
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1])[None, :] + 0.5
    mask = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        mask |= (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    return mask
