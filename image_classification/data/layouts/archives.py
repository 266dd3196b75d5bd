"""Data sets in archives: `.tar`, `.tar.gz`, `.tar.bz2`, `.tar.xz` and `.zip`, unpacked once into the cache.

Members cannot leave the target directory: names are checked, and a tar member that is a link, or comes after one,
passes Python's `data` filter (PEP 706).
"""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO

from image_classification.cache import build_directory, cache_key
from image_classification.data.progress import progress_bar

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
_MEBI = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether a file is named like an archive that can be unpacked."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path, cache_dir: Path, *, progress: bool = True) -> Path:
    """Unpack an archive, or find it unpacked: the cache key is its absolute path, size and modification time.

    Raises:
        ValueError: The file is not an archive of a known kind, is damaged, or has members that point outside it.
    """
    if not is_archive(archive):
        raise ValueError(f"{archive} is a file but not an archive; known are {', '.join(ARCHIVE_SUFFIXES)}")
    status = archive.stat()
    key = cache_key(str(archive.resolve()), status.st_size, status.st_mtime_ns)
    target = cache_dir / "archives" / f"{archive.name.split('.')[0]}-{key}"
    unpack_into = _unpack_zip if archive.name.lower().endswith(".zip") else _unpack_tar
    try:
        return build_directory(target, lambda directory: unpack_into(archive, directory, progress))
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is not safe to unpack: {error}") from error
    except (tarfile.TarError, zipfile.BadZipFile, LZMAError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{archive} is damaged or incomplete ({error}): copy or download it again"
        ) from error


def _unpack_tar(archive: Path, target: Path, progress: bool) -> None:
    # Progress is the position in the packed file, since the number of members is known only at the end.
    with (
        archive.open("rb") as packed,
        progress_bar(f"unpacking {archive.name} (MiB)", archive.stat().st_size // _MEBI, progress) as advance,
    ):
        report = _position_reporter(packed, advance)
        try:
            with tarfile.open(fileobj=packed, mode="r:*") as members:
                has_links = False
                for member in members:
                    has_links = has_links or not (member.isreg() or member.isdir())
                    if member.isreg() and not has_links and _stays_inside(member.name):
                        _write(members.extractfile(member), target / member.name)
                    else:
                        members.extract(member, target, filter="data")
                    report()
        except OSError as error:
            # Decompressors report damaged data as an OSError without a number; a full disk has one.
            if error.errno is not None:
                raise
            raise tarfile.ReadError(str(error)) from error


def _stays_inside(name: str) -> bool:
    """Whether a member's name stays below the target, provided that the archive has no links."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _write(source: IO[bytes] | None, destination: Path) -> None:
    """Write one member. Far cheaper than `TarFile.extract`, which resolves every path again."""
    assert source is not None  # only links and special files have no content
    try:
        sink = destination.open("wb")
    except FileNotFoundError:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sink = destination.open("wb")
    with source, sink:
        shutil.copyfileobj(source, sink, _MEBI)


def _position_reporter(packed: IO[bytes], advance: Callable[[int], None]) -> Callable[[], None]:
    reported = 0

    def report() -> None:
        nonlocal reported
        position = packed.tell() // _MEBI
        if position > reported:
            advance(position - reported)
            reported = position

    return report


def _unpack_zip(archive: Path, target: Path, progress: bool) -> None:
    with zipfile.ZipFile(archive) as members:
        infos = members.infolist()
        for info in infos:
            if not _stays_inside(info.filename):
                raise ValueError(f"{archive} is not safe to unpack: {info.filename!r} lies outside it")
        with progress_bar(f"unpacking {archive.name}", len(infos), progress) as advance:
            for info in infos:
                if info.is_dir():
                    (target / info.filename).mkdir(parents=True, exist_ok=True)
                else:
                    _write(members.open(info), target / info.filename)
                advance(1)
    if not os.listdir(target):
        raise ValueError(f"{archive} is empty")
