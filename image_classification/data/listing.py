"""Finding the picture files below a directory, with what tells cheaply whether they have changed since."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from image_classification.data.imagefile import is_picture

_NUM_THREADS = 16  # the work waits for the file system, network ones above all


class FileEntry(NamedTuple):
    """A file of a listing: POSIX path relative to the listed root, bytes and modification time."""

    path: str
    num_bytes: int
    mtime_ns: int


def list_pictures(root: Path, folder: str) -> list[FileEntry]:
    """The pictures under `root/folder`, subfolders and symbolic links included, sorted by path."""
    return sorted(_walk(root / folder, folder, frozenset()))


def list_class_folders(root: Path, folders: Sequence[str]) -> list[list[FileEntry]]:
    """`list_pictures` of several folders, in parallel: network file systems answer slowly, but many at a time."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda folder: list_pictures(root, folder), folders))


def _walk(directory: Path, relative: str, above: frozenset[tuple[int, int]]) -> Iterable[FileEntry]:
    """All picture files below a directory. `above` are the directories on the way here, to end link cycles."""
    status = os.stat(directory)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _walk(Path(entry.path), path, above | {identity})
            elif is_picture(entry.name):
                try:
                    status = entry.stat()
                    yield FileEntry(path, status.st_size, status.st_mtime_ns)
                except OSError:  # a dangling link stays a sample: the loader's policy decides about it
                    yield FileEntry(path, 0, 0)
