"""Files that are written whole or not at all, and names that are not taken yet."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"


@contextlib.contextmanager
def atomic_path(target: Path, suffix: str | None = None) -> Iterator[Path]:
    """A name to write to in place of `target`; moved onto it on success, removed on failure.

    Args:
        target: The final name.
        suffix: Of the temporary name; the target's own by default, because writers choose their format by it.
    """
    ending = target.suffix if suffix is None else suffix
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}{ending}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(OSError):  # of what went wrong before, the reason is the one to tell
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; its folder is made.

    Raises:
        OSError: As `atomic_file`.
    """
    with atomic_file(path) as file:
        file.write(text.encode())


def copy_file(source: Path, path: Path) -> None:
    """A copy of a file's content, whole or not at all.

    Raises:
        OSError: As `atomic_file`.
    """
    with source.open("rb") as original, atomic_file(path) as file:
        shutil.copyfileobj(original, file, length=16 << 20)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is whole and on disk; its folder is made.

    Raises:
        OSError: Naming the file, when the disk is full or the folder is not writable; what stood under the name
            before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, TEMPORARY) as unfinished, unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror or error}): {way_out(error)} or choose another folder; the previous "
            "file is untouched",
        ) from error


def way_out(error: OSError) -> str:
    """What lets a file be written that could not be."""
    if error.errno == errno.EROFS:
        return "mount its file system for writing"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "let this user write there"
    return "free space"


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; file systems without directory handles are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unused_path(path: Path) -> Path:
    """`path`, or the first of `name.1.ext`, `name.2.ext`, … that does not exist."""
    candidate = path
    number = 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return candidate
