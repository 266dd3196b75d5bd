"""A miniature Pascal VOC devkit, as unpacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from image_classification.data.layouts.voc import CLASS_NAMES

#: Objects of an image: (class, box in VOC's convention, difficult).
Objects = list[tuple[str, tuple[float, ...], int]]


def annotation_xml(objects: Objects, width: int = 40, height: int = 30) -> str:
    """Return the text of an annotation file."""
    boxes = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin>"
        f"<ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox><part><name>head</name></part></object>"
        for name, (x0, y0, x1, y1), difficult in objects
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{boxes}</annotation>"


def write_devkit(root: Path, num_train: int = 48, num_val: int = 6) -> Path:
    """Write noise images of 40×30 pixels with one or two objects and boxes; every fourth has a mask and is listed for
    it.

    The second object of every sixth image is difficult. Returns the year's folder.
    """
    year = root / "VOCdevkit" / "VOC2012"
    for folder in (
        *("ImageSets/Main", "ImageSets/Segmentation", "Annotations"),
        *("SegmentationClass", "JPEGImages"),
    ):
        (year / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = [f"2008_{number:03d}" for number in range(num_train + num_val)]
    for number, name in enumerate(names):
        kinds = {CLASS_NAMES[number % 3], CLASS_NAMES[14]} if number % 2 else {CLASS_NAMES[number % 3]}
        mask = np.zeros((30, 40), np.uint8)
        objects: Objects = []
        for place, kind in enumerate(sorted(kinds)):
            left = 2 + 18 * place
            objects.append((kind, (left + 1, 5, left + 15, 20), int(place == 1 and number % 6 == 5)))
            mask[4:20, left : left + 15] = CLASS_NAMES.index(kind) + 1
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(year / "JPEGImages" / f"{name}.jpg")
        if number % 4 == 1:
            Image.fromarray(mask).save(year / "SegmentationClass" / f"{name}.png")
        (year / "Annotations" / f"{name}.xml").write_text(annotation_xml(objects))
    sets = {"train": names[:num_train], "val": names[num_train:], "trainval": names}
    for image_set, listed in sets.items():
        with_masks = [name for name in listed if (year / "SegmentationClass" / f"{name}.png").exists()]
        (year / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(listed))
        (year / "ImageSets" / "Segmentation" / f"{image_set}.txt").write_text("\n".join(with_masks))
    return year
