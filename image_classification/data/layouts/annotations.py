"""Annotation files of Pascal VOC and of ImageNet's localisation task: boxes of objects in one XML file per image.

Both use the same elements but count differently. VOC's pixels start at 1 and the last one belongs to the box, so (xmin,
xmax) becomes the half-open [xmin − 1, xmax). ImageNet's coordinates are used unchanged, [xmin, xmax).
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classification.small_files import read_text

_LARGEST = 1 << 20


@dataclass(frozen=True, eq=False)
class Annotation:
    """The content of one annotation file.

    Attributes:
        width, height: The image's size in pixels, as annotated.
        names: Class name (VOC) or synset id (ImageNet) of each object.
        boxes: (k, 4) float32 `x0, y0, x1, y1` in raw pixels, ends exclusive.
        difficult: (k,) bool, VOC's flag for objects that its evaluation ignores.
    """

    width: int
    height: int
    names: tuple[str, ...]
    boxes: np.ndarray
    difficult: np.ndarray


def read_annotation(path: Path, *, one_based: bool) -> Annotation:
    """Read an annotation file.

    Args:
        path: The XML file.
        one_based: VOC's convention of pixels (True) or ImageNet's (False).

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not an annotation, has no object, or has a box without area.
    """
    if not path.exists():
        raise FileNotFoundError(f"the annotation {path} is missing")
    # Only UTF-8 is accepted, so that the markup below cannot hide in another encoding.
    text = read_text(path, "the annotation", _LARGEST)
    # Neither set uses these, and entity expansion can exhaust memory.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path} declares a document type, which no annotation does")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not well-formed XML: {error}") from error
    objects = root.findall("object")
    if not objects:
        raise ValueError(f"{path} annotates no object")
    return Annotation(
        width=int(_number(root, "size/width", path)),
        height=int(_number(root, "size/height", path)),
        names=tuple(_text(element, "name", path) for element in objects),
        boxes=np.array([_box(element, path, one_based) for element in objects], np.float32),
        difficult=np.array([element.findtext("difficult", "0").strip() == "1" for element in objects]),
    )


def read_imagenet_boxes(
    annotation_dir: Path, image_paths: Sequence[str], class_names: Sequence[str]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Read the boxes of ImageNet images, in the order of `image_paths`, for a `TargetTable`.

    The file of `…/n01440764/ILSVRC2012_val_00000293.JPEG` is `ILSVRC2012_val_00000293.xml`, either directly in
    `annotation_dir` (the validation set's archive) or in its folder `n01440764/` (the training set's).

    Args:
        annotation_dir: Directory of the XML files.
        image_paths: A manifest's paths.
        class_names: Synset ids by class index.

    Returns:
        Per image (k, 4) float32 boxes and (k,) int64 class indices.

    Raises:
        FileNotFoundError, ValueError: As `read_annotation`; also for an object of an unknown class.
    """
    index = {name: number for number, name in enumerate(class_names)}
    boxes, classes = [], []
    for image in map(Path, image_paths):
        path = annotation_dir / f"{image.stem}.xml"
        if not path.is_file():
            path = annotation_dir / image.parent.name / f"{image.stem}.xml"
        annotation = read_annotation(path, one_based=False)
        boxes.append(annotation.boxes)
        classes.append(class_indices(annotation.names, index, path))
    return tuple(boxes), tuple(classes)


def class_indices(names: Sequence[str], index: dict[str, int], path: Path) -> np.ndarray:
    """Return the class indices of objects, (k,) int64.

    Raises:
        ValueError: A name is not one of the classes.
    """
    unknown = sorted(set(names) - index.keys())
    if unknown:
        raise ValueError(f"{path} has objects of unknown classes: {', '.join(unknown)}")
    return np.array([index[name] for name in names], np.int64)


def _box(element: ElementTree.Element, path: Path, one_based: bool) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (_number(element, f"bndbox/{name}", path) for name in ("xmin", "ymin", "xmax", "ymax"))
    if one_based:
        x0, y0 = x0 - 1, y0 - 1
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{path} has a box without area: x from {x0:g} to {x1:g}, y from {y0:g} to {y1:g}")
    return x0, y0, x1, y1


def _number(element: ElementTree.Element, name: str, path: Path) -> float:
    text = _text(element, name, path)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: <{name.split('/')[-1]}> is {text[:60]!r}, not a number")
    return value


def _text(element: ElementTree.Element, name: str, path: Path) -> str:
    text = element.findtext(name)
    if text is None:
        raise ValueError(f"{path} has no <{name.split('/')[-1]}> in <{element.tag}>")
    return text.strip()
