"""Class folders: `train/<class>/…` and `val/<class>/…`, as ImageNet and the CIFAR pictures are kept.

Classes are the folder names in sorted order, as torchvision's `ImageFolder` numbers them, so that published weights
fit. The validation split may be called `val`, `validation`, `valid` or `test`; the first that exists is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from image_classification.data.dataset import Dataset, preset_for
from image_classification.data.imagefile import IMAGE_SUFFIXES, is_picture
from image_classification.data.listing import list_class_folders
from image_classification.data.manifest import Manifest, read_headers
from image_classification.data.targets import TargetTable

VALIDATION_NAMES = ("val", "validation", "valid", "test")


def recognise(root: Path) -> bool:
    """Whether a directory has a `train` folder."""
    return (root / "train").is_dir()


def open_folders(
    root: Path,
    *,
    cache_dir: Path,
    name: str | None = None,
    progress: bool = True,
    require_val: bool = True,
) -> Dataset:
    """Open a directory of class folders.

    Args:
        root: Directory with `train/` and a validation folder.
        cache_dir: Where the scan of the headers is kept.
        name: The data set's name in reports; the directory's by default.
        progress: Show a bar for large sets.
        require_val: Without it a missing validation folder gives an empty split.

    Raises:
        ValueError: A split is missing or empty, a class folder is empty, or the splits have different classes.
    """
    train = scan_class_folders(root, "train", "train", cache_dir=cache_dir, progress=progress)
    folder = next((candidate for candidate in VALIDATION_NAMES if (root / candidate).is_dir()), None)
    if folder is not None:
        val = scan_class_folders(root, folder, "val", cache_dir=cache_dir, progress=progress)
        _check_same_classes(root, folder, train.class_names, val.class_names)
    elif require_val:
        raise ValueError(
            f"{root} has train/ but no validation split: expected one of "
            f"{', '.join(name + '/' for name in VALIDATION_NAMES)} with the same class folders beside it"
        )
    else:
        val = train.subset([], split="val")
    return Dataset(name or root.name, train, val, train.class_names, False, preset_for(train))


def scan_class_folders(
    root: Path, folder: str, split: str, *, cache_dir: Path, progress: bool = True
) -> Manifest:
    """The manifest of one split, `root/folder/<class>/…`.

    Raises:
        ValueError: No class folders, or one without pictures.
    """
    directory = root / folder
    class_names = class_folders(directory)
    if not class_names:
        raise ValueError(_no_classes_message(directory))
    listings = list_class_folders(root, [f"{folder}/{name}" for name in class_names])
    empty = [name for name, listing in zip(class_names, listings, strict=True) if not listing]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(class_names)} class folders in {directory} have no pictures: "
            f"{_some(empty)}; delete or fill them (pictures end in {', '.join(IMAGE_SUFFIXES)}, in any case)"
        )
    entries = [entry for listing in listings for entry in listing]
    labels = np.repeat(np.arange(len(listings), dtype=np.int64), [len(listing) for listing in listings])
    headers = read_headers(root, entries, cache_dir=cache_dir, label=folder, progress=progress)
    return Manifest(
        root, split, tuple(entry.path for entry in entries), *headers, TargetTable(labels), tuple(class_names)
    )


def class_folders(directory: Path) -> list[str]:
    """Names of the folders in a directory, sorted; hidden ones do not count."""
    return sorted(
        path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _no_classes_message(directory: Path) -> str:
    num_pictures = sum(is_picture(path.name) for path in directory.iterdir())
    if num_pictures:
        return (
            f"{directory} has {num_pictures:,} pictures but no class folders: sort them into one folder per class "
            "(for ImageNet's validation pictures by the synset id, n01440764/ and so on)"
        )
    return f"{directory} is empty: expected one folder of pictures per class"


def _check_same_classes(root: Path, folder: str, train: Sequence[str], val: Sequence[str]) -> None:
    if tuple(train) == tuple(val):
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [
        f"only in {name}/: {_some(names)}"
        for name, names in (("train", only_train), (folder, only_val))
        if names
    ]
    raise ValueError(
        f"train/ and {folder}/ of {root} have different classes ({len(train)} and {len(val)}), so that labels would "
        f"not correspond; {'; '.join(parts)}"
    )


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
