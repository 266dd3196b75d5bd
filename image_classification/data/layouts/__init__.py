"""Layouts: how data sets lie on disk, and `open_dataset`, which recognises them.

| `data` | layout |
|---|---|
| `train/` and `val/` (or `validation/`, `valid/`, `test/`) in a directory | class folders: ImageNet, CIFAR pictures |
| `data_batch_1`… or `train`, `test`, `meta`, or their `.bin`, in a directory | CIFAR-10/100 as published |
| `VOCdevkit/`, `VOC2012/` | Pascal VOC: multi-label, boxes, masks |
| `.tar`, `.tar.gz`, `.tar.xz`, `.tar.bz2`, `.zip` | any of these, unpacked once into the cache |
| `shapes`, `shapes-multi` | generated pictures with exact masks and boxes |
"""

from __future__ import annotations

from pathlib import Path

from image_classification.data.cache import default_cache_dir
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.imagefile import is_picture
from image_classification.data.layouts import archives, cifar, folders, voc
from image_classification.data.shapes import is_shapes, open_shapes

__all__ = ["Dataset", "Preset", "open_dataset"]

_KNOWN = (
    "known layouts: class folders train/<class>/ and val/<class>/ (ImageNet, CIFAR pictures), the published CIFAR-10 "
    "and CIFAR-100 files, a Pascal VOC devkit, a .tar or .zip archive of one of these, or the generated `shapes` and "
    "`shapes-multi`"
)


def open_dataset(
    data: str,
    *,
    multi_label: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
    require_val: bool = True,
) -> Dataset:
    """Open a data set by its directory, archive or name.

    Args:
        data: See the table above; `shapes` may carry its size, `shapes:train=600,val=100,seed=1`.
        multi_label: Give class indices as multi-hot rows; for `shapes` the same as `shapes-multi`. Sets that are
            multi-label by nature (VOC, `shapes-multi`) are so in any case.
        cache_dir: For unpacked archives, generated pictures and header scans; `default_cache_dir()` if None.
        progress: Show bars for what takes long.
        require_val: Whether a missing validation split is an error; without it (jobs that only read train) the
            split is then empty.

    Raises:
        FileNotFoundError: There is no such file or directory, or a listed file is missing.
        ValueError: The layout is unknown or incomplete; the message says what was found and what is expected.
    """
    cache = default_cache_dir() if cache_dir is None else cache_dir
    if is_shapes(data):
        return open_shapes(data, multi_label=multi_label, cache_dir=cache, progress=progress)
    root = Path(data).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"the data set {data!r} does not exist; {_KNOWN}")
    name = root.name.split(".")[0] if root.is_file() else root.resolve().name
    if root.is_file():
        root = archives.unpack(root, cache, progress=progress)
    dataset = _open_directory(root, name, cache, progress, require_val)
    return dataset.as_multi_label() if multi_label else dataset


def _open_directory(root: Path, name: str, cache: Path, progress: bool, require_val: bool) -> Dataset:
    """Try `root`, then the directory in it if there is just one: archives often have one above everything."""
    inner = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    for candidate in (root, *inner) if len(inner) == 1 else (root,):
        devkit = voc.find_voc(candidate)
        if devkit is not None:
            return voc.open_voc(devkit, cache_dir=cache, progress=progress, require_val=require_val)
        form = cifar.recognise(candidate)
        if form is not None:
            return cifar.open_cifar(candidate, form, cache_dir=cache, progress=progress)
        if folders.recognise(candidate):
            return folders.open_folders(
                candidate, name=name, cache_dir=cache, progress=progress, require_val=require_val
            )
    raise ValueError(_unknown_message(root, inner))


def _unknown_message(root: Path, inner: list[Path]) -> str:
    """What is in a directory that is no known layout."""
    num_pictures = sum(is_picture(path.name) for path in root.iterdir())
    with_pictures = [path for path in inner if any(is_picture(child.name) for child in path.iterdir())]
    if num_pictures:
        found = (
            f"{root} has {num_pictures:,} pictures but neither splits nor class folders: "
            "sort them into train/<class>/ and val/<class>/"
        )
    elif any(path.name in folders.VALIDATION_NAMES for path in inner):
        found = f"{root} has a validation split but no train/"
    elif with_pictures:
        found = (
            f"{root} has class folders ({with_pictures[0].name}/ …) but no splits: move them into train/ and a "
            "held-out part of each into val/"
        )
    else:
        found = f"{root} holds no data set that is known here"
    return f"{found}; {_KNOWN}"
