"""Decoding of a plan on the host with Pillow: the reference for all other backends.

Images are used as stored (EXIF orientation ignored), as 8-bit RGB. The resize is Pillow's antialiased triangle filter,
the same as torchvision's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from image_classification.data.bad_samples import BadSamples
from image_classification.data.imagefile import DECODING_ERRORS, load_as_stored, stored_size
from image_classification.data.plan import BatchPlan, Planner
from image_classification.process_state import ProcessState

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats that every backend decodes."""


class UnreadableError(Exception):
    """An image cannot be decoded; the message says why."""


@dataclass
class Decoded:
    """The images of a batch before the device stage.

    Attributes:
        plan: The plan, with substitutes.
        images: (N, H, W, 3) uint8, valid until the next batch is requested.
        bad: Reasons by id for samples found unreadable.
    """

    plan: BatchPlan
    images: Tensor
    bad: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> Decoded:
        """Return the images in page-locked memory; torch's DataLoader calls this method."""
        return Decoded(self.plan, self.images.pin_memory(), self.bad)


#: Pillow warns of large images and odd metadata. Threads decode at the same time.
_WITHOUT_WARNINGS = ProcessState(lambda: warnings.catch_warnings(action="ignore"))


def open_image(path: Path, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a file fully.

    Args:
        path: Image in any of `FORMATS`, whatever its name.
        expected_size: Height and width; another size means that the file was changed since it was scanned.

    Raises:
        UnreadableError: With the reason.
    """
    if not path.is_file() and path.exists():  # opening a named pipe would block
        raise UnreadableError("no regular file")
    try:
        with _WITHOUT_WARNINGS.changed(), Image.open(path, formats=FORMATS) as image:
            if image.mode == "F":
                raise UnreadableError(
                    "its pixels are in floating point, of which every decoder makes other bytes"
                )
            height, width = stored_size(image)
            if expected_size is not None and (height, width) != expected_size:
                raise UnreadableError(
                    f"it has {height}×{width} pixels, not the {expected_size[0]}×{expected_size[1]} of its header "
                    "when the data set was scanned"
                )
            return _to_rgb(load_as_stored(image))
    except Image.DecompressionBombError as error:
        raise UnreadableError(str(error)) from error
    except DECODING_ERRORS as error:
        name = "an unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableError(name or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; Pillow would clip 16-bit grey at 255 instead of scaling it."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        grey = np.clip(np.floor(values / 257.0 + 0.5), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def cut(
    image: Image.Image, window: np.ndarray, size: tuple[int, int], *, flip: bool, crop_first: bool
) -> np.ndarray:
    """Execute one row of a plan and return (H, W, 3) uint8. Arguments as in `BatchPlan`."""
    top, left, height, width = (float(value) for value in window)
    output = (size[1], size[0])
    if crop_first:
        # Pillow fills the area outside the image with black.
        image = image.crop((int(left), int(top), int(left + width), int(top + height)))
        if image.size != output:
            image = image.resize(output, Image.Resampling.BILINEAR)
    else:
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        image = image.resize(output, Image.Resampling.BILINEAR, box=box)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def decode_batch(plan: BatchPlan, planner: Planner, samples: BadSamples) -> Decoded:
    """Decode a plan, replacing unreadable samples if the policy says so; nothing is logged or raised for them.

    Under the policy "stop" the result of a batch with an unreadable sample names it and has no images.
    """
    images = np.empty((len(plan), *plan.size, 3), dtype=np.uint8)
    ids = plan.sample_ids.copy()
    bad: dict[int, str] = {}
    for row, sample_id in enumerate(plan.sample_ids):
        image = None
        while image is None:
            try:
                image = open_sample(int(ids[row]), samples)
            except UnreadableError as error:
                bad[int(ids[row])] = str(error)
                samples.known[ids[row]] = True
                if samples.policy == "stop":
                    return Decoded(plan, torch.from_numpy(images[:0]), bad)
                ids[row] = samples.next_good(int(ids[row]))
        source, place = plan, row
        if ids[row] != sample_id:
            source = planner.plan(plan.epoch, plan.step, ids[row : row + 1])
            place = 0
        flip = bool(source.flips[place])
        images[row] = cut(image, source.windows[place], plan.size, flip=flip, crop_first=plan.crop_first)
    if bad:
        plan = planner.plan(plan.epoch, plan.step, ids)
    return Decoded(plan, torch.from_numpy(images), bad)


def open_sample(sample_id: int, samples: BadSamples) -> Image.Image:
    """Decode a sample of the manifest.

    Raises:
        UnreadableError: With the reason.
    """
    manifest = samples.manifest
    size = (int(manifest.heights[sample_id]), int(manifest.widths[sample_id]))
    if size[0] == 0:
        raise UnreadableError("the file is missing or its header is damaged")
    return open_image(manifest.path(sample_id), size)
