"""Images of a folder as tensors, preprocessed for a network: any folder of image files, or class folders.

folder/a.jpg, folder/b.jpg …                 no labels folder/<class>/a.jpg …                       labels, if there are
as many class folders as the network has classes folder/train/<class>/…                       a data set: its training
images
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_classification.config import ConfigError, check
from image_classification.data.decode import UnreadableError
from image_classification.data.listing import list_images
from image_classification.data.single_image import pixels_of
from image_classification.network_input import NetworkInput

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlainImages:
    """Images in memory.

    Attributes:
        images: (N, 3, S, S) float32, normalised.
        labels: (N,) class indices, or None.
        num_found: Number of images in the folder.
    """

    images: Tensor
    labels: Tensor | None
    num_found: int

    def split(self, count: int) -> tuple[PlainImages, PlainImages]:
        """Split into the first `count` images and the rest."""
        labels = (None, None) if self.labels is None else (self.labels[:count], self.labels[count:])
        parts = [
            PlainImages(images, some, self.num_found)
            for images, some in zip((self.images[:count], self.images[count:]), labels, strict=True)
        ]
        return parts[0], parts[1]


def read_folder(
    folder: Path, count: int, wanted: NetworkInput, num_classes: int | None, seed: int
) -> PlainImages:
    """Read up to `count` images of a folder, chosen at random; unreadable ones are skipped with a warning.

    Args:
        folder: See above.
        count: Largest number of images.
        wanted: Geometry and normalisation.
        num_classes: Number of classes of the network; labels are returned only if the folder has that many class
            folders.
        seed: Seed of the choice of images.

    Raises:
        ConfigError: The folder does not exist, or no image can be read.
    """
    check(folder.is_dir(), f"IMAGES {folder}: no such folder")
    root = folder / "train" if (folder / "train").is_dir() else folder
    paths = sorted(entry.path for entry in list_images(root, "."))
    check(bool(paths), f"IMAGES {folder}: holds no image files")
    classes = sorted({parts[0] for parts in (Path(path).parts for path in paths) if len(parts) > 1})
    labelled = num_classes is not None and len(classes) == num_classes
    order = np.random.default_rng(seed).permutation(len(paths))
    images: list[Tensor] = []
    labels: list[int] = []
    for number in order.tolist():
        if len(images) == count:
            break
        path = Path(paths[number])
        try:
            images.append(pixels_of(root / path, wanted))
        except UnreadableError as error:
            log.warning("%s cannot be read and is left out: %s", root / path, error)
            continue
        labels.append(classes.index(path.parts[0]) if labelled and len(path.parts) > 1 else -1)
    if not images:
        raise ConfigError(f"IMAGES {folder}: none of {len(paths)} image files can be read")
    known = labelled and -1 not in labels
    return PlainImages(torch.stack(images), torch.tensor(labels) if known else None, len(paths))
