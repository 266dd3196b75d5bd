"""Pascal VOC devkit (Everingham et al.): 20 classes, several per picture, boxes, and masks for some pictures.

Train is the image set `ImageSets/Main/train`, validation `Main/val`. An object marked "difficult" gives neither a
label nor a box, since the official evaluation passes over it; a picture that shows only such objects stays, with all
labels 0. Masks come from `SegmentationClass` where a picture has one: their palette indices are already this
package's encoding (class index + 1 in alphabetical order, 0 background, 255 void).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from image_classification.data.dataset import IMAGENET_PRESET, Dataset
from image_classification.data.imagefile import read_header
from image_classification.data.layouts.annotations import class_indices, read_annotation
from image_classification.data.listing import FileEntry
from image_classification.data.manifest import Headers, Manifest, read_headers
from image_classification.data.progress import progress_bar
from image_classification.data.targets import TargetTable

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_INDEX = {name: number for number, name in enumerate(CLASS_NAMES)}
_SHOW_PROGRESS_FROM = 2_000


def find_voc(root: Path) -> Path | None:
    """The year's directory: `root` itself, or the newest `VOC20xx` below it or below its `VOCdevkit`."""
    for base in (root, root / "VOCdevkit"):
        for candidate in (base, *sorted(base.glob("VOC20[0-9][0-9]"), reverse=True)):
            if (candidate / "ImageSets" / "Main").is_dir() and (candidate / "JPEGImages").is_dir():
                return candidate
    return None


def open_voc(
    root: Path,
    *,
    cache_dir: Path,
    progress: bool = True,
    train_set: str = "train",
    val_set: str = "val",
    require_val: bool = True,
) -> Dataset:
    """Open a year of the devkit, e.g. `VOCdevkit/VOC2012`.

    Args:
        root: The year's directory.
        cache_dir: Where the scan of the headers is kept.
        progress: Show a bar.
        train_set, val_set: Lists in `ImageSets/Main`: "train", "val", "trainval" or, for VOC2007, "test".
        require_val: Without it a missing validation list gives an empty split.

    Raises:
        FileNotFoundError: A list, picture or annotation is missing.
        ValueError: A list is empty; an annotation without objects or of an unknown class; a mask of another size
            than its picture. The message names the file.
    """
    train = _open_split(root, "train", train_set, cache_dir, progress)
    if require_val or _list_path(root, val_set).is_file():
        val = _open_split(root, "val", val_set, cache_dir, progress)
    else:
        val = train.subset([], split="val")
    return Dataset(root.name.lower(), train, val, CLASS_NAMES, multi_label=True, preset=IMAGENET_PRESET)


def _list_path(root: Path, image_set: str) -> Path:
    return root / "ImageSets" / "Main" / f"{image_set}.txt"


def _open_split(root: Path, split: str, image_set: str, cache_dir: Path, progress: bool) -> Manifest:
    names = _read_list(root, image_set)
    entries = [_picture_entry(root, name, image_set) for name in names]
    headers = read_headers(root, entries, cache_dir=cache_dir, label=image_set, progress=progress)
    targets = _read_targets(root, names, headers, f"reading {image_set} annotations", progress)
    return Manifest(root, split, tuple(entry.path for entry in entries), *headers, targets, CLASS_NAMES)


def _read_list(root: Path, image_set: str) -> list[str]:
    path = _list_path(root, image_set)
    if not path.is_file():
        raise FileNotFoundError(f"the image set {path} is missing: is the devkit unpacked completely?")
    names = path.read_text().split()
    if not names:
        raise ValueError(f"the image set {path} is empty")
    if any("/" in name or name.startswith(".") for name in names):
        raise ValueError(f"the image set {path} is no plain list of picture names")
    return names


def _picture_entry(root: Path, name: str, image_set: str) -> FileEntry:
    path = f"JPEGImages/{name}.jpg"
    try:
        status = (root / path).stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root / path} is missing, but ImageSets/Main/{image_set}.txt lists it"
        ) from None
    return FileEntry(path, status.st_size, status.st_mtime_ns)


def _read_targets(
    root: Path, names: list[str], headers: Headers, description: str, progress: bool
) -> TargetTable:
    labels = np.zeros((len(names), len(CLASS_NAMES)), np.float32)
    boxes, box_classes, masks = [], [], []
    with progress_bar(description, len(names), progress and len(names) >= _SHOW_PROGRESS_FROM) as advance:
        for row, name in enumerate(names):
            path = root / "Annotations" / f"{name}.xml"
            annotation = read_annotation(path, one_based=True)
            classes = class_indices(annotation.names, _INDEX, path)[~annotation.difficult]
            labels[row, classes] = 1.0
            boxes.append(annotation.boxes[~annotation.difficult])
            box_classes.append(classes)
            masks.append(_mask_path(root, name, int(headers.heights[row]), int(headers.widths[row])))
            advance(1)
    return TargetTable(labels, tuple(boxes), tuple(box_classes), tuple(masks), multi_label=True)


def _mask_path(root: Path, name: str, height: int, width: int) -> str:
    """Relative path of a picture's mask, "" without one; its size must be the picture's, where that is known."""
    path = f"SegmentationClass/{name}.png"
    if not (root / path).is_file():
        return ""
    header = read_header(root / path)
    if height and (header.height, header.width) != (height, width):
        raise ValueError(
            f"the mask {root / path} is {header.width} × {header.height} pixels, its picture {width} × {height}"
        )
    return path
