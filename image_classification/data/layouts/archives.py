"""Data sets in archives: `.tar`, `.tar.gz`, `.tar.bz2`, `.tar.xz` and `.zip`, unpacked once into the cache.

Members cannot leave the target directory: names are checked, and a tar member that is a link, or comes after one,
passes Python's `data` filter (PEP 706).
"""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from image_classification.cache import build_directory, cache_key
from image_classification.data.progress import progress_bar

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
_MEBI = 1 << 20
#: Images hardly compress: one that unpacks to more than this multiple of its size, plus these bytes, is refused.
_MOST_AGAIN = 100
_FREE_EXTENT = 1 << 30
_LONGEST_TAIL = 64  # MiB
#: Errors raised by the modules for files that are damaged, encrypted or in an unsupported compression.
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, LZMAError, EOFError, zlib.error),
    *(RuntimeError, UnicodeError),
)
#: Errors of members' names: too long, a file in place of a folder, characters that the file system rejects.
_ODD_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)


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
    except _DAMAGED as error:
        raise ValueError(
            f"{archive} is damaged or incomplete ({error}): copy or download it again"
        ) from error
    except OSError as error:
        if error.errno not in _ODD_NAMES:
            raise
        raise ValueError(
            f"{archive} has a member that cannot be unpacked ({error.strerror}): unpack it by other means, and give "
            "the folder"
        ) from error


def _unpack_tar(archive: Path, target: Path, progress: bool) -> None:
    # Progress is the position in the packed file, since the number of members is known only at the end.
    with (
        archive.open("rb") as packed,
        progress_bar(f"unpacking {archive.name} (MiB)", archive.stat().st_size // _MEBI, progress) as advance,
    ):
        report = _position_reporter(packed, advance)
        try:
            with tarfile.open(fileobj=packed, mode=_mode_of(packed)) as members:
                has_links, extent = False, 0
                for member in members:
                    extent += member.size
                    _check_extent(archive, extent)
                    has_links = has_links or not (member.isreg() or member.isdir())
                    if member.isreg() and not has_links and _stays_inside(member.name):
                        _write(members.extractfile(member), target / member.name)
                    else:
                        members.extract(member, target, filter="data")
                    report()
                _read_to_the_end(members)
        except OSError as error:
            # Decompressors report damaged data as an OSError without a number; a full disk has one.
            if error.errno is not None:
                raise
            raise tarfile.ReadError(str(error)) from error


def _mode_of(packed: IO[bytes]) -> Literal["r:", "r:gz", "r:bz2", "r:xz"]:
    """Return the mode for the compression of a tar file by its first bytes; trial and error is slow on other files."""
    start = packed.read(6)
    packed.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return "r:gz"
    if start.startswith(b"BZh"):
        return "r:bz2"
    return "r:xz" if start.startswith(b"\xfd7zXZ") else "r:"


def _read_to_the_end(members: tarfile.TarFile) -> None:
    """Read to the end of the archive, because decompressors verify the checksum only there.

    Raises:
        EOFError, OSError, ReadError: The file is truncated, its checksum differs, or it has no end in sight.
    """
    assert members.fileobj is not None
    for _ in range(_LONGEST_TAIL):
        if not members.fileobj.read(_MEBI):
            return
    raise tarfile.ReadError(f"more than {_LONGEST_TAIL} MiB behind its last member")


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


def _check_extent(archive: Path, num_bytes: int) -> None:
    """Refuse an archive that would fill the disk.

    Raises:
        ValueError: It unpacks to far more than itself.
    """
    if num_bytes > _MOST_AGAIN * archive.stat().st_size + _FREE_EXTENT:
        raise ValueError(
            f"{archive} unpacks to more than {num_bytes >> 30} GiB, over {_MOST_AGAIN} times its size, which images do "
            "not: if that is right, unpack it by other means, and give the folder"
        )


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
        _check_extent(archive, sum(info.file_size for info in infos))
        with progress_bar(f"unpacking {archive.name}", len(infos), progress) as advance:
            for info in infos:
                if info.is_dir():
                    (target / info.filename).mkdir(parents=True, exist_ok=True)
                else:
                    _write(members.open(info), target / info.filename)
                advance(1)
    if not os.listdir(target):
        raise ValueError(f"{archive} is empty")
