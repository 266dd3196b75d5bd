"""A single image file as a network's input, outside any data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_classification.data.decode import cut, open_image
from image_classification.data.plan import CentreCrop, WholeImage
from image_classification.network_input import NetworkInput


def pixels_of(path: Path, wanted: NetworkInput) -> Tensor:
    """Read an image as (3, S, S) float32, normalised, cropped or stretched as in evaluation.

    Raises:
        UnreadableError: The image cannot be read; the message says why.
    """
    image = open_image(path)
    side = (wanted.image_size, wanted.image_size)
    geometry = WholeImage(side) if wanted.geometry == "whole" else CentreCrop(side, wanted.resize)
    height, width = np.array([float(image.height)]), np.array([float(image.width)])
    (window,) = geometry.windows(height, width, np.zeros((1, 0)))
    pixels = cut(image, window, geometry.size, flip=False, crop_first=geometry.crop_first)
    values = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (wanted.mean, wanted.std))
    return (values - mean) / std
