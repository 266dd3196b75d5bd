"""Named arrays in a file: npz without pickles, read whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from image_classification.file_writing import atomic_path
from image_classification.small_files import problem_of

#: Errors raised by NumPy and zipfile for damaged files.
_DAMAGED = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, OverflowError, MemoryError, SyntaxError),
    *(RuntimeError, NotImplementedError, AttributeError, zipfile.BadZipFile),
)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file, atomically."""
    with atomic_path(path) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # of allow_pickle


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of an npz file, never unpickling; None if it is damaged.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"the manifest {path} does not exist")
    if problem_of(path) is not None:
        return None
    try:
        with zipfile.ZipFile(path) as members:
            if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                return None  # never written by `write_npz`: a few bytes could expand to gigabytes
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGED:
        return None
