"""Inpainting of the masked part of images by fast marching (Telea 2004, through OpenCV), for evaluating CASM."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Self

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
    with Inpainter(mean, std) as inpainter:
        return inpainter.begin(images, masks).result()


class Inpainter:
    """Inpaints batches in host threads while the caller's device does something else.

    As a context manager it ends its threads on exit; tasks not started by then are dropped.

    Args:
        mean, std: See `inpaint`.

    Raises:
        MissingPackageError: OpenCV is not installed.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._cv2 = import_opencv()
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="inpaint")
        # OpenCV releases the interpreter's lock.
        self._images = ThreadPoolExecutor(max(torch.get_num_threads(), 1), thread_name_prefix="inpaint-image")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.shutdown(cancel_futures=True)
        self._images.shutdown(cancel_futures=True)

    def begin(self, images: Tensor, masks: Tensor) -> Inpainted:
        """Queue a batch; see `inpaint`. Neither tensor may change until the batch is done.

        Raises:
            ValueError: The shapes do not match.
        """
        if masks.dtype != torch.bool or masks.shape != (len(images), 1, *images.shape[2:]):
            raise ValueError(
                f"masks have shape {tuple(masks.shape)} and type {masks.dtype}; give bool (N, 1, H, W) for images "
                f"{tuple(images.shape)}"
            )
        images = images.detach()
        return Inpainted(images, masks, self._batches.submit(self._filled, images, masks))

    def _filled(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return the inpainted images, (N, 3, H, W) float32 on the host; only pixels inside the masks are valid."""
        pixels = (images.float().cpu() * self._std + self._mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        whole_pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        holes = masks[:, 0].cpu().numpy().astype(np.uint8)

        def fill(index: int) -> np.ndarray:
            filled: np.ndarray = self._cv2.inpaint(
                whole_pixels[index], holes[index], RADIUS, self._cv2.INPAINT_TELEA
            )
            return filled

        filled = np.stack(list(self._images.map(fill, range(len(images))))) if len(images) else whole_pixels
        values = (torch.from_numpy(filled).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        whole = torch.from_numpy(holes.all((1, 2)))[:, None, None, None]
        return torch.where(whole, 0.0, values)


@dataclasses.dataclass(frozen=True)
class Inpainted:
    """A batch in an `Inpainter`."""

    images: Tensor
    masks: Tensor
    filled: Future[Tensor]

    def result(self) -> Tensor:
        """Return (N, 3, H, W) with dtype and device of the images; waits for the host threads."""
        return torch.where(self.masks, self.filled.result().to(self.images), self.images)


def import_opencv() -> ModuleType:
    """Import OpenCV.

    Raises:
        MissingPackageError: It is not installed.
    """
    with optional_import():
        import cv2
    return cv2
