"""Shared listing of a data set: rank 0 scans the files, the other ranks read its result."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from image_classification.agreement import shared_file
from image_classification.config import check
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.manifest import Manifest
from image_classification.distributed import Distributed
from image_classification.plain_data import Plain

_SPLITS = ("train", "val")


def open_together(open_dataset: Callable[[], Dataset], distributed: Distributed) -> Dataset:
    """Open a data set on all ranks as rank 0 opens it, however long that takes. Collective.

    If rank 0's files do not exist on another machine (an archive unpacked or images generated into a local cache), the
    first rank of that machine opens the set before the others do.

    Args:
        open_dataset: Opens the data set.
        distributed: The ranks.

    Raises:
        ConfigError: `open_dataset` failed on rank 0, or another rank's files differ; raised on every rank.
    """
    if not distributed.is_distributed:
        return open_dataset()
    opened: list[Dataset] = []
    folders: list[Path] = []

    def open_and_tell() -> Plain:
        opened.append(open_dataset())
        folders.append(Path(tempfile.mkdtemp(prefix="lucidprune_dataset_")))
        return _write(opened[0], folders[0])

    try:
        told = distributed.decide_on_main(open_and_tell)
        found = {split: shared_file(Path(told["folder"]) / f"{split}.npz", distributed) for split in _SPLITS}
        dataset = opened[0] if opened else _read(told, found)
        with distributed.main_process_first("opening the data set"):
            if not (dataset.train.path(0).exists() or distributed.is_main):
                dataset = _same(open_dataset(), dataset, distributed.rank)
        return dataset
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _write(dataset: Dataset, folder: Path) -> Plain:
    """Write the manifests to a folder and return everything else, JSON-able."""
    for split in _SPLITS:
        getattr(dataset, split).save(folder / f"{split}.npz")
    rest = {
        "name": dataset.name,
        "multi_label": dataset.multi_label,
        "preset": dataclasses.asdict(dataset.preset),
    }
    return {"folder": str(folder), "class_names": list(dataset.class_names), **rest}


def _read(told: Plain, found: dict[str, Path]) -> Dataset:
    preset: Plain = {
        name: tuple(value) if isinstance(value, list) else value for name, value in told["preset"].items()
    }
    return Dataset(
        told["name"],
        Manifest.load(found["train"]),
        Manifest.load(found["val"]),
        tuple(told["class_names"]),
        told["multi_label"],
        Preset(**preset),
    )


def _same(mine: Dataset, main: Dataset, rank: int) -> Dataset:
    """Return a rank's own data set, if it has the same files as rank 0's."""
    for split, own, expected in (("train", mine.train, main.train), ("val", mine.val, main.val)):
        check(
            own.fingerprint == expected.fingerprint,
            f"`data`: rank {rank} has other {split} images under {own.root} than rank 0: copy rank 0's",
        )
    return mine
