"""Inpainting of the masked part of images by fast marching (Telea 2004, through OpenCV), for evaluating CASM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from image_classification.extras import optional_import

#: Radius in pixels of the neighbourhood that a pixel is filled from.
RADIUS = 3


def inpaint(images: Tensor, masks: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Inpaint a batch.

    Pixels outside the mask are unchanged. If the mask covers a whole image there is nothing to fill from, and the image
    becomes the mean colour, 0.

    Args:
        images: (N, 3, H, W) float, normalised.
        masks: (N, 1, H, W) bool, the part to fill.
        mean, std: Normalisation constants, for values in 0 … 1.

    Returns:
        (N, 3, H, W), type and device of `images`.

    Raises:
        ValueError: OpenCV is not installed, or the shapes do not match.
    """
    if masks.dtype != torch.bool or masks.shape != (len(images), 1, *images.shape[2:]):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)} and type {masks.dtype}; give bool (N, 1, H, W) for images "
            f"{tuple(images.shape)}"
        )
    cv2 = import_opencv()
    centre = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    spread = torch.tensor(std, dtype=torch.float32)[:, None, None]
    pixels = (images.detach().float().cpu() * spread + centre).clamp(0, 1).mul(255).round().to(torch.uint8)
    whole_pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    holes = masks[:, 0].cpu().numpy().astype(np.uint8)

    def fill(index: int) -> np.ndarray:
        filled: np.ndarray = cv2.inpaint(whole_pixels[index], holes[index], RADIUS, cv2.INPAINT_TELEA)
        return filled

    # OpenCV releases the GIL.
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        filled = np.stack(list(pool.map(fill, range(len(images))))) if len(images) else whole_pixels
    values = (torch.from_numpy(filled).permute(0, 3, 1, 2).float() / 255 - centre) / spread
    whole = masks.flatten(1).all(1).cpu()[:, None, None, None]
    values = torch.where(whole, 0.0, values).to(images)
    return torch.where(masks, values, images)


def import_opencv() -> ModuleType:
    """Import OpenCV.

    Raises:
        MissingPackageError: It is not installed.
    """
    with optional_import():
        import cv2
    return cv2
