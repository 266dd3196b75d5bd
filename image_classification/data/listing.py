"""Listing of the image files below a directory, with cheap evidence of later changes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from image_classification.data.imagefile import IMAGE_SUFFIXES, OTHER_SUFFIXES, is_image

_NUM_THREADS = 16  # listing waits for the file system, above all network ones


class FileEntry(NamedTuple):
    """A file of a listing: POSIX path relative to the listed root, size in bytes and modification time."""

    path: str
    num_bytes: int
    mtime_ns: int


def list_images(
    root: Path,
    folder: str,
    directories: dict[str, int] | None = None,
    left_out: Counter[str] | None = None,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
) -> list[FileEntry]:
    """List the images under `root/folder`, including subfolders and symbolic links, sorted by path.

    Args:
        root: Directory that paths are relative to.
        folder: Folder to search.
        directories: Receives the modification time, in nanoseconds, of every directory visited, by path.
        left_out: Receives counts, by suffix, of images in formats that not every backend decodes, such as GIF.
        suffixes: Suffixes of image files.
    """
    seen: dict[str, int] = {} if directories is None else directories
    taken = []
    for entry in sorted(_walk(root / folder, folder, frozenset(), seen)):
        if entry.path.lower().endswith(suffixes):
            taken.append(entry)
        elif left_out is not None:
            left_out[Path(entry.path).suffix.lower()] += 1
    return taken


def stat_images(root: Path, paths: Sequence[str], *, listed_in: str) -> list[FileEntry]:
    """Return the entries of image files named in a list.

    Args:
        root: Directory that the paths are relative to.
        paths: POSIX paths, whose order is kept.
        listed_in: The list, for the message.

    Raises:
        FileNotFoundError: One of the files is missing.
    """

    def entry(path: str) -> FileEntry:
        try:
            status = os.stat(root / path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{root / path} is missing, but {listed_in} lists it") from None
        return FileEntry(path, status.st_size, status.st_mtime_ns)

    # Network file systems are slow, but handle many requests at a time.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(entry, paths))


def _walk(
    directory: Path, relative: str, above: frozenset[tuple[int, int]], directories: dict[str, int]
) -> Iterable[FileEntry]:
    """Yield all image files below a directory, of any format.

    `above` holds the directories above this one, to break link cycles.
    """
    status = os.stat(directory)
    directories[relative] = status.st_mtime_ns
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _walk(Path(entry.path), path, above | {identity}, directories)
            elif is_image(entry.name, (*IMAGE_SUFFIXES, *OTHER_SUFFIXES)):
                try:
                    status = entry.stat()
                    yield FileEntry(path, status.st_size, status.st_mtime_ns)
                except OSError:  # a dangling link stays a sample; the loader's policy handles it
                    yield FileEntry(path, 0, 0)
