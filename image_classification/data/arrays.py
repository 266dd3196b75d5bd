"""Named arrays in a file: npz without pickles, read whole or not at all."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from image_classification.file_writing import atomic_path


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file, atomically."""
    with atomic_path(path) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # of allow_pickle


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of an npz file, never unpickling; None if it is damaged.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"the manifest {path} does not exist") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
