"""The cache directory for things made once and reused: unpacked archives, generated images, header scans.

A directory is built under a temporary name and renamed once complete, under a file lock: several ranks that start
together build it once, and a job killed while building leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: only the final rename keeps concurrent builders apart
    fcntl = None  # type: ignore[assignment]

from image_classification.file_writing import reason_of

logger = logging.getLogger(__name__)

#: In a folder that everyone may write to, a link in place of a lock could lead anywhere.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
#: Errors of a location that cannot be written to, as opposed to errors in the data.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def default_cache_dir() -> Path:
    """Return `$LUCIDPRUNE_CACHE`, or `~/.cache/lucidprune`.

    Raises:
        ValueError: The user does not exist or has no home directory.
    """
    configured = os.environ.get("LUCIDPRUNE_CACHE")
    try:
        return Path(configured or "~/.cache/lucidprune").expanduser()
    except RuntimeError as error:  # no HOME, or ~nobody
        raise ValueError(
            f"there is no home folder to keep the cache in ({error}): point the environment variable LUCIDPRUNE_CACHE "
            "at a directory that can be written"
        ) from error


def cache_key(*parts: object) -> str:
    """Return a short hexadecimal name for the parts that identify a cache entry."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def ensure_directory(directory: Path) -> None:
    """Create a directory of the cache.

    Raises:
        ValueError: The location cannot be written to; the message says how to choose another.
    """
    missing = [folder for folder in (directory, *directory.parents) if not folder.is_dir()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for folder in reversed(missing):
            _share(folder)
    except OSError as error:
        raise ValueError(
            f"the cache directory {directory} cannot be created ({error.strerror}): "
            "point the environment variable LUCIDPRUNE_CACHE at a directory that can be written"
        ) from error


def _share(folder: Path) -> None:
    """Make a folder within a world-writable one (such as /tmp, mode 1777) accessible to everyone too."""
    mode = folder.parent.stat().st_mode
    if mode & stat.S_IWOTH:
        folder.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Report a full disk or an inaccessible folder with a remedy, when writing to the cache inside the block.

    Raises:
        ValueError: Raised in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and folder not in Path(error.filename).parents
        if error.errno not in _UNWRITABLE or elsewhere:
            raise
        raise ValueError(
            f"the cache {folder} cannot be written ({reason_of(error)}): free space there, or point the environment "
            "variable LUCIDPRUNE_CACHE at a directory that can be written"
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock `<path>.lock` inside the block; yield whether it could be acquired.

    A file system without locks does not stop the job: all work under the lock ends in an atomic rename.
    """
    ensure_directory(path.parent)
    with contextlib.ExitStack() as stack:
        held = False
        with naming_the_cache(path.parent):
            handle = _open_lock(path.parent / (path.name + ".lock"))
        if handle is not None and fcntl is not None:
            stack.callback(os.close, handle)  # releases the lock
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                held = True
            except OSError as error:
                logger.warning("no file lock on %s (%s): going on without one", path.parent, error.strerror)
        with naming_the_cache(path.parent):
            yield held


def _open_lock(path: Path) -> int | None:
    """Open a lock file, creating it if needed; another user's is opened for reading. None if it is inaccessible."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
    except PermissionError:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | _NO_LINK)
        return None
    with contextlib.suppress(OSError):  # another user's file, already accessible
        if path.parent.stat().st_mode & stat.S_IWOTH:
            os.fchmod(handle, 0o666)
    return handle


def build_directory(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, made by `build(empty directory)` if it does not exist yet. Complete or absent, never partial."""
    if target.is_dir():
        return target
    with locked(target) as held:
        if target.is_dir():
            return target
        # Leftovers of a killed builder; nobody else can be building while this process holds the lock.
        if held:
            for leftover in target.parent.glob(target.name + ".building-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=target.name + ".building-", dir=target.parent))
        try:
            build(unfinished)
            unfinished.chmod(0o755)  # mkdtemp's 0700 would shut out the other users of a shared cache
            _share(unfinished)
            try:
                unfinished.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                # Another process, also without a lock, was faster: use its directory.
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target
