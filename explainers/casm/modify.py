"""Images with the mask's part kept, removed or inpainted; and masks that do not depend on the image, for comparison.

Żołna et al. 2020, section 5.2: b is the mask binarised at the quantile that its own mean gives; masked-in x·b,
masked-out x·(1 − b), and masked-out images inpainted. Removed pixels take the data set's mean colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from explainers.casm.inpaint import inpaint
from explainers.measures.localization import saliency_threshold

#: Kinds of images, in the order of tables.
KINDS = ("whole", "masked in", "masked out", "inpainted")
#: Masks that need no network. Grid cells are sized for 56 cells on images of 224 pixels, others in proportion.
BASELINES = ("zeros", "ones", "random grid", "random pixels")
_CELL = 4


def binarised(masks: Tensor) -> Tensor:
    """Binarise masks (N, 1, H, W) in [0, 1] to bool at each mask's `localization.saliency_threshold`."""
    arrays = masks.detach().float().cpu().numpy()
    kept = np.stack([array > saliency_threshold(array[0]) for array in arrays]) if len(arrays) else arrays > 0
    return torch.from_numpy(kept).to(masks.device)


def baseline_masks(name: str, sample_ids: Tensor, size: int) -> Tensor:
    """Return masks that do not depend on the image's content.

    Args:
        name: One of `BASELINES`. The random ones include each cell (a square of 4 pixels) or pixel with probability ½,
            seeded by the image's number, so that the same image gets the same mask.
        sample_ids: (N,) int64.
        size: Side of the images, in pixels.

    Returns:
        (N, 1, size, size) bool, on the CPU.
    """
    if name in ("zeros", "ones"):
        return torch.full((len(sample_ids), 1, size, size), name == "ones")
    cell = _CELL if name == "random grid" else 1
    cells = -(-size // cell)
    drawn = []
    for number in sample_ids.tolist():
        drawn.append(np.random.default_rng([cell, number]).random((cells, cells)) < 0.5)
    grid = torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, cells, cells, dtype=torch.bool)
    return grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None, :size, :size]


def modified(images: Tensor, mask: Tensor, kind: str, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return images modified as one of `KINDS`.

    Args:
        images: (N, 3, H, W), normalised.
        mask: (N, 1, H, W) bool.
        kind: One of `KINDS`.
        mean, std: Normalisation constants; inpainting needs them.
    """
    if kind == "whole":
        return images
    if kind == "masked in":
        return images * mask
    if kind == "masked out":
        return images * ~mask
    return inpaint(images, mask, mean, std)
