"""Files that are written whole or not at all, and names that are not taken yet."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"


class WriteError(OSError):
    """A file could not be written: the message names it, the reason and a way out.

    Attributes:
        path: The file.
        reason: What the system said.
    """

    def __init__(self, error: OSError, path: Path) -> None:
        self.path, self.reason = path, reason_of(error)
        super().__init__(
            error.errno,
            f"cannot write {path} ({self.reason}): {way_out(error)} or choose another folder; the previous file is "
            "untouched",
        )


@contextlib.contextmanager
def atomic_path(target: Path, suffix: str | None = None) -> Iterator[Path]:
    """A name to write to in place of `target`; moved onto it on success, removed on failure. Its folder is made.

    Args:
        target: The final name.
        suffix: Of the temporary name; the target's own by default, because writers choose their format by it.

    Raises:
        WriteError: The disk is full or the folder is not writable; what stood under the name before is untouched.
    """
    ending = target.suffix if suffix is None else suffix
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}{ending}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, target)
    except WriteError as error:
        if error.path == unfinished:  # a writer of its own kind within
            raise WriteError(error, target) from error
        raise
    except OSError as error:
        named = {str(name) for name in (error.filename, error.filename2) if name is not None}
        if named and not named & set(map(str, (unfinished, target, *target.parents))):
            raise  # about another file, which was read meanwhile
        raise WriteError(error, target) from error
    finally:
        with contextlib.suppress(OSError):  # of what went wrong before, the reason is the one to tell
            unfinished.unlink(missing_ok=True)


def output_path(word: str) -> Path:
    """The path that a word of the command line names, if something can be written there: `type=` of an argument.

    Raises:
        ArgumentTypeError: Nothing can.
    """
    path = Path(word)
    present = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if present != path.absolute() and not present.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: {present} is a file: give a path in a folder")
    if not os.access(present, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{path}: {present} is closed for writing: open it, or give another path"
        )
    return path


def resolved(path: Path) -> Path:
    """The absolute path without links; one that leads to itself is left, for whoever opens it to tell."""
    return Path(os.path.realpath(path))


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; its folder is made.

    Raises:
        WriteError: As `atomic_path`.
    """
    with atomic_file(path) as file:
        file.write(text.encode())


def copy_file(source: Path, path: Path) -> None:
    """A copy of a file's content, whole or not at all.

    Raises:
        WriteError: As `atomic_path`.
    """
    with source.open("rb") as original, atomic_file(path) as file:
        shutil.copyfileobj(original, file, length=16 << 20)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is whole and on disk; its folder is made.

    Raises:
        WriteError: As `atomic_path`.
    """
    with atomic_path(path, TEMPORARY) as unfinished, unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def reason_of(error: OSError) -> str:
    """What the system said of a failure."""
    return error.reason if isinstance(error, WriteError) else error.strerror or str(error)


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
