"""Scan of the image files of a split: their list and the content of their headers, cached.

The first start lists every folder and reads every header (about 50 µs each). Results are saved every half minute, so
that a job stopped during the scan continues there. Later starts check the modification time of each directory, which
tells whether files were added, removed or replaced: changed directories are listed again, and files with another size
or time are read again. A file overwritten in place changes no directory, so the first file of each folder is checked
too, as are all files that could not be read; `rescan` checks every file.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from image_classification.cache import cache_key, locked
from image_classification.data.arrays import read_npz, write_npz
from image_classification.data.imagefile import read_header
from image_classification.data.listing import FileEntry, list_images, stat_images
from image_classification.data.paths import Paths
from image_classification.data.progress import progress_bar

logger = logging.getLogger(__name__)

_SHOW_PROGRESS_FROM = 20_000
CHUNK = 256  # number of files that a thread reads before it reports
NUM_THREADS = 16  # scanning waits for the file system, above all network ones
SECONDS_BETWEEN_PARTS = 30.0  # between two saves of the results so far
_FRESH_NS = 2 * 10**9  # a directory changed just now may change again without another modification time
_NEVER = -1

#: One row per file: size and time of the file when its header was read, and the header's content.
_ROW = np.dtype(
    [
        ("num_bytes", np.int64),
        ("mtime_ns", np.int64),
        ("heights", np.int32),
        ("widths", np.int32),
        ("digests", np.uint64),
        ("intact", np.bool_),
        ("turned", np.bool_),
        ("read", np.bool_),
    ]
)


#: Columns that `_read` returns for each file.
_READ = ("heights", "widths", "digests", "intact", "turned")


class Headers(NamedTuple):
    """Columns read from the files' headers, each (N,): int32, int32, uint64, bool. See `imagefile.Header`."""

    heights: np.ndarray
    widths: np.ndarray
    digests: np.ndarray
    intact: np.ndarray


class Files(NamedTuple):
    """The files of a folder or of a list.

    Attributes:
        directories: Path → modification time in nanoseconds, of every directory visited.
        paths: N POSIX paths.
        rows: (N,) of `_ROW`.
        left_out: Suffix → number of image files in formats that not every backend decodes.
    """

    directories: dict[str, int]
    paths: Paths
    rows: np.ndarray
    left_out: dict[str, int]


def scan_folders(
    root: Path,
    folders: Sequence[str],
    *,
    cache_dir: Path,
    label: str,
    rescan: bool = False,
    progress: bool = True,
) -> tuple[Paths, Headers, list[int]]:
    """List the images of several folders, including subfolders and symbolic links, sorted by path, with headers.

    Args:
        root: Directory that the paths are relative to.
        folders: POSIX paths.
        cache_dir: Directory of the scan, which is identified by the absolute path of `root` and by `label`.
        label: The split's name.
        rescan: Check every file, whatever the directories' times.
        progress: Show a progress bar for large sets.

    Returns:
        Paths and headers of all images, folder after folder, and the number of images per folder.
    """

    def look(folder: str, known: Files | None) -> Files:
        if known is not None and not rescan and _is_unchanged(root, known):
            return known
        directories: dict[str, int] = {}
        left_out = Counter[str]()
        entries = list_images(root, folder, directories, left_out)
        return _noted(entries, directories, known)._replace(left_out=dict(left_out))

    table = _scan(root, folders, look, cache_dir, label, progress)
    left_out = sum((Counter(files.left_out) for files in table.folders.values()), Counter[str]())
    if left_out:
        logger.warning(
            "%s: %s left out: not every backend decodes them (`python -m image_classification prepare` writes a copy "
            "as JPEG)",
            root,
            ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items())),
        )
    return table.paths, _headers(table.rows), [len(files.paths) for files in table.folders.values()]


def scan_list(
    root: Path,
    paths: Sequence[str],
    *,
    listed_in: str,
    cache_dir: Path,
    label: str,
    rescan: bool = False,
    progress: bool = True,
) -> Headers:
    """Read the headers of listed files. Arguments as for `scan_folders` and `listing.stat_images`.

    Raises:
        FileNotFoundError: One of the files is missing.
    """

    def look(_: str, known: Files | None) -> Files:
        if known is not None and not rescan and known.paths == paths and _is_unchanged(root, known):
            return known
        parents = {str(PurePosixPath(path).parent) for path in paths}
        directories = {parent: _changed_at(root / parent) for parent in sorted(parents)}
        return _noted(stat_images(root, paths, listed_in=listed_in), directories, known)

    return _headers(_scan(root, [""], look, cache_dir, label, progress).rows)


def _headers(rows: np.ndarray) -> Headers:
    return Headers(*(np.ascontiguousarray(rows[name]) for name in Headers._fields))


def _is_unchanged(root: Path, known: Files) -> bool:
    try:
        if any(_changed_at(root / directory) != then for directory, then in known.directories.items()):
            return False
        if len(known.paths) == 0 or not known.rows["num_bytes"][0]:  # 0: a dangling link has no size
            return True
        status = os.stat(root / known.paths[0])
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == tuple(known.rows[["num_bytes", "mtime_ns"]][0])


def _changed_at(directory: Path) -> int:
    return os.stat(directory).st_mtime_ns


def _noted(entries: Sequence[FileEntry], directories: dict[str, int], known: Files | None) -> Files:
    """Build rows for a listing; known rows of files with unchanged size and time are reused."""
    now = time.time_ns()
    times = {path: then if then < now - _FRESH_NS else _NEVER for path, then in directories.items()}
    rows = np.zeros(len(entries), _ROW)
    rows["num_bytes"] = [entry.num_bytes for entry in entries]
    rows["mtime_ns"] = [entry.mtime_ns for entry in entries]
    paths = Paths.of(entry.path for entry in entries)
    if known is not None:
        places = {path: place for place, path in enumerate(known.paths)}
        old = np.array([places.get(path, -1) for path in paths], np.int64)
        both = np.flatnonzero(old >= 0)
        before = known.rows[old[both]]
        same = (before["num_bytes"] == rows["num_bytes"][both]) & (
            before["mtime_ns"] == rows["mtime_ns"][both]
        )
        rows[both[same]] = before[same]
    return Files(times, paths, rows, {})


class _Table(NamedTuple):
    """The files of all folders as one table, and each folder as a slice of it."""

    folders: dict[str, Files]
    paths: Paths
    rows: np.ndarray


def _scan(
    root: Path,
    folders: Sequence[str],
    look: Callable[[str, Files | None], Files],
    cache_dir: Path,
    label: str,
    progress: bool,
) -> _Table:
    """Check each folder, read unknown headers, and save the result."""
    cached = cache_dir / "scans" / f"{cache_key(str(root.resolve()), label)}.npz"
    with locked(cached), ThreadPoolExecutor(NUM_THREADS) as pool:
        known = _load(cached)
        found = list(pool.map(lambda folder: look(folder, known.folders.get(folder)), folders))
        table = known
        if [id(files) for files in found] != [id(files) for files in known.folders.values()]:
            table = _joined(folders, found)
        unread = np.flatnonzero(~table.rows["read"] | (table.rows["heights"] == 0))
        changed = table is not known
        saved = time.monotonic()
        shown = progress and len(unread) >= _SHOW_PROGRESS_FROM
        with progress_bar(f"scanning {label}", len(unread), shown) as advance:
            chunks = [unread[start : start + CHUNK] for start in range(0, len(unread), CHUNK)]
            for ids, headers in pool.map(lambda ids: _read(f"{root}/", table.paths, ids), chunks):
                before = table.rows[ids]
                for name, column in zip(_READ, zip(*headers, strict=True), strict=True):
                    table.rows[name][ids] = column
                table.rows["read"][ids] = True
                changed = changed or bool((table.rows[ids] != before).any())
                advance(len(ids))
                if time.monotonic() - saved > SECONDS_BETWEEN_PARTS:
                    _keep(cached, table)
                    saved = time.monotonic()
        if changed:
            _keep(cached, table)
    _warn(root, table)
    return table


def _read(
    prefix: str, paths: Paths, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[tuple[object, ...]]]:
    limit = 2**31 - 1
    headers = [read_header(prefix + paths[i]) for i in ids]
    return ids, [(min(h.height, limit), min(h.width, limit), h.digest, h.intact, h.turned) for h in headers]


def _joined(folders: Sequence[str], parts: Sequence[Files]) -> _Table:
    paths = Paths.concatenated([part.paths for part in parts])
    rows = np.concatenate([np.zeros(0, _ROW), *(part.rows for part in parts)])
    notes = [(part.directories, part.left_out) for part in parts]
    return _cut(folders, notes, [len(part.paths) for part in parts], paths, rows)


def _cut(
    folders: Iterable[str],
    notes: Iterable[tuple[dict[str, int], dict[str, int]]],
    counts: Sequence[int],
    paths: Paths,
    rows: np.ndarray,
) -> _Table:
    """Build a table whose slices have these numbers of files, directories and counts of skipped files."""
    pieces = {}
    start = 0
    for folder, (directories, left_out), count in zip(folders, notes, counts, strict=True):
        stop = start + count
        pieces[folder] = Files(directories, paths.rows(start, stop), rows[start:stop], left_out)
        start = stop
    return _Table(pieces, paths, rows)


def _keep(cached: Path, table: _Table) -> None:
    """Save a table, unless the record there is another user's: in a shared cache, only its owner may replace it."""
    try:
        _save(cached, table)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES) or not cached.is_file():
            raise
        logger.warning(
            "%s is another user's record of these files: what has changed since is not kept there", cached
        )


def _save(cached: Path, table: _Table) -> None:
    parts = table.folders.values()
    arrays = {
        "rows": table.rows,
        "num_files": np.array([len(files.paths) for files in parts], np.int64),
        "num_directories": np.array([len(files.directories) for files in parts], np.int64),
        "times": np.array([then for files in parts for then in files.directories.values()], np.int64),
        **table.paths.to_arrays("paths"),
        **Paths.of(path for files in parts for path in files.directories).to_arrays("directories"),
        **Paths.of(table.folders).to_arrays("folders"),
        "num_left_out": np.array([len(files.left_out) for files in parts], np.int64),
        "counts": np.array([count for files in parts for count in files.left_out.values()], np.int64),
        **Paths.of(suffix for files in parts for suffix in files.left_out).to_arrays("suffixes"),
    }
    write_npz(cached, arrays)


def _load(cached: Path) -> _Table:
    """Load an earlier scan; an empty table if there is none or it is damaged."""
    arrays = read_npz(cached) if cached.is_file() else None
    if arrays is None or arrays.get("rows", np.zeros(0)).dtype != _ROW or "num_left_out" not in arrays:
        return _joined((), ())
    try:
        return _table_of(arrays)
    except (KeyError, ValueError, IndexError, TypeError):
        return _joined((), ())


def _table_of(arrays: Mapping[str, np.ndarray]) -> _Table:
    directories = _dicts(arrays, "directories", "times", "num_directories")
    left_out = _dicts(arrays, "suffixes", "counts", "num_left_out")
    folders, paths = Paths.from_arrays(arrays, "folders"), Paths.from_arrays(arrays, "paths")
    notes = zip(directories, left_out, strict=True)
    return _cut(folders, notes, arrays["num_files"].tolist(), paths, arrays["rows"])


def _dicts(arrays: Mapping[str, np.ndarray], keys: str, values: str, lengths: str) -> list[dict[str, int]]:
    """Split concatenated keys and values into one mapping per folder, with the given lengths."""
    entries = iter(zip(Paths.from_arrays(arrays, keys), arrays[values].tolist(), strict=True))
    return [dict(itertools.islice(entries, length)) for length in arrays[lengths].tolist()]


def _warn(root: Path, table: _Table) -> None:
    turned = int(np.count_nonzero(table.rows["turned"]))
    if turned:
        logger.warning(
            "%s: EXIF says that %d of %d images are to be shown turned or mirrored; they are taken as they are stored "
            "(`python -m image_classification prepare --upright` writes a copy with all of them upright)",
            root,
            turned,
            len(table.paths),
        )
    unreadable = np.flatnonzero(table.rows["heights"] == 0)
    if len(unreadable):
        logger.warning(
            "%s: %d of %d images have an unreadable header, first %s (`python -m image_classification verify` "
            "names all that is broken)",
            root,
            len(unreadable),
            len(table.paths),
            table.paths[int(unreadable[0])],
        )
