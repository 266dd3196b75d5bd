"""Atomic writing of files, and names that are not taken yet."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"


class WriteError(OSError):
    """A file could not be written; the message names it, the reason and a remedy.

    Attributes:
        path: The file.
        reason: The system's error message.
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
    """Yield a name to write to instead of `target`; it is moved there on success and removed on failure.

    The folder is created if needed. A link stays one: the file that it leads to is replaced; not so a link that another
    user left in a folder which everyone may write to. A device or a pipe (`/dev/null`, `/dev/stdout`) is never
    replaced: the finished file is written into it.

    Args:
        target: The final name.
        suffix: Suffix of the temporary name; the target's own by default, because writers choose their format by it.

    Raises:
        WriteError: The disk is full or the folder is not writable; any earlier file of that name is untouched.
    """
    ending = target.suffix if suffix is None else suffix
    followed = not target.is_symlink() or _is_trusted(target)
    if followed and _is_device(target):
        with tempfile.TemporaryDirectory() as folder:
            unfinished = Path(folder) / f"output{ending}"
            yield unfinished
            _write_into(target, unfinished)
        return
    if followed and target.is_symlink():
        target = resolved(target)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}{ending}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, target)
    except WriteError as error:
        if error.path == unfinished:  # raised by a nested writer
            raise WriteError(error, target) from error
        raise
    except OSError as error:
        named = {str(name) for name in (error.filename, error.filename2) if name is not None}
        if named and not named & set(map(str, (unfinished, target, *target.parents))):
            raise  # about another file, which was read meanwhile
        raise WriteError(error, target) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            unfinished.unlink(missing_ok=True)


def _is_trusted(link: Path) -> bool:
    """Whether a link may be followed: in a folder that everyone may write to, only its owner's and this user's own.

    This is Linux's rule for opening files (`protected_symlinks`): a link could lead to any file of the one who writes.
    """
    folder, owner = link.parent.stat(), link.lstat().st_uid
    return not folder.st_mode & stat.S_IWOTH or owner in (folder.st_uid, os.geteuid())


def _is_device(path: Path) -> bool:
    """Whether a path leads to something that holds no file: a device, a pipe or a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write_into(device: Path, source: Path) -> None:
    """Copy a file's content into a device or a pipe.

    Raises:
        WriteError: It cannot be written, such as a pipe that no process reads.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe would wait for a reader, for ever if there is none.
        handle = os.open(device, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "wb") as output, source.open("rb") as content:
            os.set_blocking(handle, True)
            shutil.copyfileobj(content, output, length=16 << 20)
    except OSError as error:
        raise WriteError(error, device) from error


def output_path(word: str) -> Path:
    """Return the path named on a command line, if it can be written to; used as `type=` of an argument.

    Raises:
        ArgumentTypeError: The path cannot be written to.
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
    """Return the absolute path without links; a circular link is kept, so that opening it raises the error."""
    return Path(os.path.realpath(path))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, creating its folder if needed.

    Raises:
        WriteError: As for `atomic_path`.
    """
    with atomic_file(path) as file:
        file.write(text.encode())


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's content atomically.

    Raises:
        WriteError: As for `atomic_path`.
    """
    with source.open("rb") as original, atomic_file(path) as file:
        shutil.copyfileobj(original, file, length=16 << 20)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only once it is complete and on disk, creating its folder if needed.

    Raises:
        WriteError: As for `atomic_path`.
    """
    with atomic_path(path, TEMPORARY) as unfinished, unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def reason_of(error: OSError) -> str:
    """Return the system's message for a failure."""
    return error.reason if isinstance(error, WriteError) else error.strerror or str(error)


def way_out(error: OSError) -> str:
    """Return a remedy for a file that could not be written."""
    if error.errno == errno.EROFS:
        return "mount its file system for writing"
    if error.errno == errno.ENXIO:
        return "start what reads the pipe"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "let this user write there"
    return "free space"


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; a no-op on file systems without directory handles."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unused_path(path: Path) -> Path:
    """Return `path`, or the first of `name.1.ext`, `name.2.ext`, … that does not exist."""
    candidate = path
    number = 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return candidate
