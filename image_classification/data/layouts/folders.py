"""Class folders: `train/<class>/…` and `val/<class>/…`, as used for ImageNet and CIFAR images.

Classes are the folder names in sorted order, as torchvision's `ImageFolder` numbers them, so that published weights
fit. The validation split may be called `val`, `validation`, `valid` or `test`; the first that exists is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from image_classification.data.dataset import Dataset, preset_for
from image_classification.data.imagefile import IMAGE_SUFFIXES, is_image
from image_classification.data.layouts.layout import OpenOptions, register_layout
from image_classification.data.manifest import Manifest
from image_classification.data.scan import scan_folders
from image_classification.data.targets import TargetTable

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("val", "validation", "valid", "test")


def recognise(root: Path) -> bool:
    """Whether a directory has a `train` folder."""
    return (root / "train").is_dir()


@register_layout(
    "folders",
    recognise=recognise,
    description="class folders train/<class>/ and val/<class>/ (ImageNet, CIFAR images)",
    priority=-2,  # directories of other layouts may contain a train/ too
)
def open_folders(root: Path, options: OpenOptions) -> Dataset:
    """Open a directory with `train/` and a validation folder.

    Raises:
        ValueError: A split is missing or empty, a class folder is empty, or validation has a class that train lacks.
    """
    train = _scan_class_folders(root, "train", "train", options)
    folder = next((candidate for candidate in VALIDATION_NAMES if (root / candidate).is_dir()), None)
    if folder is not None:
        val = _scan_class_folders(root, folder, "val", options)
        val = _in_classes_of(train, val, root, folder)
    elif options.require_val:
        raise ValueError(
            f"{root} has train/ but no validation split: expected one of "
            f"{', '.join(name + '/' for name in VALIDATION_NAMES)} with the same class folders next to it"
        )
    else:
        val = train.subset([], split="val")
    return Dataset(options.name, train, val, train.class_names, False, preset_for(train))


def _scan_class_folders(root: Path, folder: str, split: str, options: OpenOptions) -> Manifest:
    """Build the manifest of one split, `root/folder/<class>/…`.

    Raises:
        ValueError: There are no class folders, or one has no images.
    """
    directory = root / folder
    class_names = class_folders(directory)
    if not class_names:
        raise ValueError(_no_classes_message(directory))
    paths, headers, counts = scan_folders(
        root,
        [f"{folder}/{name}" for name in class_names],
        cache_dir=options.cache_dir,
        label=folder,
        rescan=options.rescan,
        progress=options.progress,
    )
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(class_names)} class folders in {directory} have no images: "
            f"{_some(empty)}; delete or fill them (images end in {', '.join(IMAGE_SUFFIXES)}, in any case)"
        )
    return Manifest(
        root,
        split,
        paths,
        **headers._asdict(),
        targets=TargetTable(np.repeat(np.arange(len(counts), dtype=np.int64), counts)),
        class_names=tuple(class_names),
    )


def class_folders(directory: Path) -> list[str]:
    """Return the names of the folders in a directory, sorted, without hidden ones."""
    return sorted(
        path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _no_classes_message(directory: Path) -> str:
    num_images = sum(is_image(path.name) for path in directory.iterdir())
    if num_images:
        return (
            f"{directory} has {num_images:,} images but no class folders: sort them into one folder per class "
            "(for ImageNet's validation images by the synset id, n01440764/ and so on)"
        )
    return f"{directory} is empty: expected one folder of images per class"


def _in_classes_of(train: Manifest, val: Manifest, root: Path, folder: str) -> Manifest:
    """Return the validation split with the labels of the training split; it may lack some of the classes."""
    if set(val.class_names) < set(train.class_names):
        shown = f"{len(val.class_names)} of the {len(train.class_names)} classes of train/"
        logger.warning("%s has %s: figures are of these alone", root / folder, shown)
        places = [train.class_names.index(name) for name in val.class_names]
        return val.in_classes(train.class_names, places)
    _check_same_classes(root, folder, train.class_names, val.class_names)
    return val


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


def hint(root: Path) -> str | None:
    """Explain why a directory of images is not a class-folder layout; None if nothing suggests one."""
    num_images = sum(is_image(path.name) for path in root.iterdir())
    if num_images:
        return (
            f"{root} has {num_images:,} images but neither splits nor class folders: "
            "sort them into train/<class>/ and val/<class>/"
        )
    folders = [root / name for name in class_folders(root)]
    if any(folder.name in VALIDATION_NAMES for folder in folders):
        return f"{root} has a validation split but no train/"
    for folder in folders:
        if any(is_image(path.name) for path in folder.iterdir()):
            return (
                f"{root} has class folders ({folder.name}/ …) but no splits: move them into train/ and a held-out part "
                "of each into val/"
            )
    return None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown}, … ({len(names)} in all)"
