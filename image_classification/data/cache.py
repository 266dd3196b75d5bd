"""The cache directory: things made once (unpacked archives, generated pictures, header scans) and found again.

A directory is built beside its final name and renamed when it is whole, under a file lock: several ranks that start
together build it once, and a job that is killed while building leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: the final rename alone keeps concurrent builders apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`$LUCIDPRUNE_CACHE`, or `~/.cache/lucidprune`."""
    configured = os.environ.get("LUCIDPRUNE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "lucidprune"


def cache_key(*parts: object) -> str:
    """Short hexadecimal name for whatever identifies a cache entry."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def ensure_directory(directory: Path) -> None:
    """Create a directory of the cache.

    Raises:
        ValueError: The place cannot be written; the message says how to choose another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache directory {directory} cannot be created ({error.strerror}): "
            "point the environment variable LUCIDPRUNE_CACHE at a directory that can be written"
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock `<path>.lock` while inside; yields whether a lock could be had.

    File systems without locks are no reason to stop: everything done under the lock ends in an atomic rename.
    """
    ensure_directory(path.parent)
    with (path.parent / (path.name + ".lock")).open("w") as handle:
        held = False
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                held = True
            except OSError as error:
                logger.warning("no file lock on %s (%s): going on without one", path.parent, error.strerror)
        yield held  # closing the file releases the lock


def build_directory(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, made by `build(empty directory)` if it is not there yet. Whole or absent, never partial."""
    if target.is_dir():
        return target
    with locked(target) as held:
        if target.is_dir():
            return target
        if held:  # what an earlier, killed builder left; nobody else can be building while the lock is ours
            for leftover in target.parent.glob(target.name + ".building-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=target.name + ".building-", dir=target.parent))
        try:
            build(unfinished)
            unfinished.chmod(0o755)  # mkdtemp's 0700 would shut out the other users of a shared cache
            try:
                unfinished.rename(target)
            except OSError:
                if (
                    not target.is_dir()
                ):  # otherwise another builder without a lock was faster: its result serves
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A name to write to in place of `target`; moved onto it on success, removed on failure.

    The temporary name ends in the target's own suffix, because writers choose their format by it.
    """
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}-{os.urandom(4).hex()}{target.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
