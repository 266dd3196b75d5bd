"""Pascal VOC devkit (Everingham et al.): 20 classes, several per image, boxes, and masks for some images.

Train is the image set `ImageSets/Main/train`, validation `Main/val`. An object marked "difficult" has neither a label
nor a box unless requested, since the official evaluation ignores it; an image with only such objects is kept, with all
labels 0. Masks come from `SegmentationClass`, if an image has one (`ImageSets/Segmentation` lists these images): their
palette indices are already this package's encoding (class index + 1 in alphabetical order, 0 background, 255 void).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from image_classification.data.dataset import IMAGENET_PRESET, Dataset
from image_classification.data.imagefile import read_header
from image_classification.data.layouts.annotations import class_indices, read_annotation
from image_classification.data.layouts.layout import OpenOptions, register_layout
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.data.scan import Headers, scan_list
from image_classification.data.targets import TargetTable
from image_classification.small_files import read_text

CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
)
_INDEX = {name: number for number, name in enumerate(CLASS_NAMES)}
_SHOW_PROGRESS_FROM = 2_000


def find_voc(root: Path) -> Path | None:
    """Find the year's directory: `root` itself, or the newest `VOC20xx` below it or below its `VOCdevkit`."""
    for base in (root, root / "VOCdevkit"):
        for candidate in (base, *sorted(base.glob("VOC20[0-9][0-9]"), reverse=True)):
            if (candidate / "ImageSets" / "Main").is_dir() and (candidate / "JPEGImages").is_dir():
                return candidate
    return None


@register_layout(
    "voc",
    recognise=lambda root: find_voc(root) is not None,
    description="a Pascal VOC devkit",
    priority=-1,
)
def open_directory(root: Path, options: OpenOptions) -> Dataset:
    """Open the newest year in a directory. Raises as `open_voc`."""
    devkit = find_voc(root)
    assert devkit is not None
    return open_voc(
        devkit,
        cache_dir=options.cache_dir,
        progress=options.progress,
        require_val=options.require_val,
        rescan=options.rescan,
        difficult=options.difficult,
    )


def open_voc(
    root: Path,
    *,
    cache_dir: Path,
    progress: bool = True,
    train_set: str = "train",
    val_set: str = "val",
    require_val: bool = True,
    rescan: bool = False,
    difficult: bool = False,
) -> Dataset:
    """Open a year of the devkit, e.g. `VOCdevkit/VOC2012`.

    Args:
        root: The year's directory.
        cache_dir: Directory for the header scan.
        progress: Show a bar.
        train_set, val_set: Lists in `ImageSets/Main`: "train", "val", "trainval" or, for VOC2007, "test".
        require_val: If False, a missing validation list gives an empty split.
        rescan: Check every file, even if no directory's modification time has changed.
        difficult: Whether objects marked "difficult" count like others.

    Raises:
        FileNotFoundError: A list, image or annotation is missing.
        ValueError: A list is empty, an annotation has no objects or an unknown class, or a mask's size differs from its
            image's. The message names the file.
    """
    read = partial(
        _open_split, root, cache_dir=cache_dir, rescan=rescan, progress=progress, difficult=difficult
    )
    train = read("train", f"Main/{train_set}")
    if require_val or _list_path(root, f"Main/{val_set}").is_file():
        val = read("val", f"Main/{val_set}")
    else:
        val = train.subset([], split="val")
    sets = {"train": f"Segmentation/{train_set}", "val": f"Segmentation/{val_set}"}

    def open_masked(split: str) -> tuple[Manifest, str]:
        return read(split, sets[split]), f"ImageSets/{sets[split]}"

    listed = all(_list_path(root, image_set).is_file() for image_set in sets.values())
    return Dataset(
        root.name.lower(),
        train,
        val,
        CLASS_NAMES,
        multi_label=True,
        preset=IMAGENET_PRESET,
        open_masked=open_masked if listed else None,
    )


def _list_path(root: Path, image_set: str) -> Path:
    return root / "ImageSets" / f"{image_set}.txt"


def _open_split(
    root: Path,
    split: str,
    image_set: str,
    *,
    cache_dir: Path,
    rescan: bool,
    progress: bool,
    difficult: bool,
) -> Manifest:
    names = _read_list(root, image_set)
    paths = [f"JPEGImages/{name}.jpg" for name in names]
    label = image_set.removeprefix("Main/").replace("/", "-")
    headers = scan_list(
        root,
        paths,
        listed_in=f"ImageSets/{image_set}.txt",
        cache_dir=cache_dir,
        label=label,
        rescan=rescan,
        progress=progress,
    )
    targets = _read_targets(root, names, headers, f"reading {label} annotations", progress, difficult)
    return Manifest(root, split, paths, **headers._asdict(), targets=targets, class_names=CLASS_NAMES)


def _read_list(root: Path, image_set: str) -> list[str]:
    path = _list_path(root, image_set)
    if not path.exists():
        raise FileNotFoundError(f"the image set {path} is missing: is the devkit unpacked completely?")
    names = read_text(path, "the image set").split()
    if not names:
        raise ValueError(f"the image set {path} is empty")
    if any("/" in name or "\0" in name or name.startswith(".") for name in names):
        raise ValueError(f"the image set {path} is not a plain list of image names")
    return names


def _read_targets(
    root: Path, names: list[str], headers: Headers, description: str, progress: bool, difficult: bool
) -> TargetTable:
    labels = np.zeros((len(names), len(CLASS_NAMES)), np.float32)
    boxes, box_classes, masks = [], [], []
    with progress_bar(description, len(names), progress and len(names) >= _SHOW_PROGRESS_FROM) as advance:
        for row, name in enumerate(names):
            path = root / "Annotations" / f"{name}.xml"
            annotation = read_annotation(path, one_based=True)
            counted = np.ones_like(annotation.difficult) if difficult else ~annotation.difficult
            classes = class_indices(annotation.names, _INDEX, path)[counted]
            labels[row, classes] = 1.0
            boxes.append(annotation.boxes[counted])
            box_classes.append(classes)
            masks.append(_mask_path(root, name, int(headers.heights[row]), int(headers.widths[row])))
            advance(1)
    return TargetTable(labels, tuple(boxes), tuple(box_classes), tuple(masks), multi_label=True)


def _mask_path(root: Path, name: str, height: int, width: int) -> str:
    """Return the relative path of an image's mask, "" without one; its size must be the image's, if known."""
    path = f"SegmentationClass/{name}.png"
    if not (root / path).is_file():
        return ""
    header = read_header(root / path)
    if height and (header.height, header.width) != (height, width):
        raise ValueError(
            f"the mask {root / path} is {header.width} × {header.height} pixels, its image {width} × {height}"
        )
    return path
