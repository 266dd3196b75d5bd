"""The manifest of a split: path, raw size, quick identity and target of every sample, nothing decoded.

It is what makes the data plan possible: crop windows are computed on the host from the raw sizes, and a sample id
(the row in the manifest) is all that a loader has to move. Listing the files is cheap and happens on every start;
reading their headers (about 50 µs each) happens once and is cached under the listing's digest of names, sizes and
modification times.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from image_classification.data.cache import atomic_path, cache_key, locked
from image_classification.data.imagefile import read_header
from image_classification.data.listing import FileEntry
from image_classification.data.progress import progress_bar
from image_classification.data.targets import TargetTable

logger = logging.getLogger(__name__)

_FORMAT = 1
_SHOW_PROGRESS_FROM = 20_000
_CHUNK = 256
_NUM_THREADS = 16  # the work waits for the file system, network ones above all


@dataclass(frozen=True, eq=False)
class Manifest:
    """One split of a data set.

    Attributes:
        root: Directory that `paths` are relative to.
        split: "train", "val" or "calibration".
        paths: N POSIX paths.
        heights, widths: (N,) int32 raw pixels as stored: EXIF orientation is ignored, as every backend does. 0 × 0
            for a file whose header cannot be read; what happens to it is the loader's policy.
        digests: (N,) uint64 quick identity of each file, from its length and first KiB.
        targets: Labels, boxes and masks by sample id.
        class_names: Names by class index.
    """

    root: Path
    split: str
    paths: tuple[str, ...]
    heights: np.ndarray
    widths: np.ndarray
    digests: np.ndarray
    targets: TargetTable
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("heights", "widths", "digests", "targets")}
        if any(length != len(self.paths) for length in lengths.values()):
            raise ValueError(f"columns of different lengths: {len(self.paths)} paths, {lengths}")

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, sample_id: int) -> Path:
        """Where the file of a sample lies."""
        return self.root / self.paths[sample_id]

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Paths of the files whose header could not be read."""
        return tuple(self.paths[i] for i in np.flatnonzero(self.heights == 0))

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what is learned from: paths, targets, sizes, file identities; not of the root."""
        state = hashlib.blake2b(digest_size=16)
        for names in (self.paths, self.class_names):
            state.update("\0".join(names).encode("utf-8", "surrogateescape"))
            state.update(b"\1")
        columns = {"heights": self.heights, "widths": self.widths, "digests": self.digests}
        columns |= self.targets.to_arrays()
        for name, array in sorted(columns.items()):
            state.update(name.encode())
            state.update(f"{array.dtype.str}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()

    def subset(self, sample_ids: np.ndarray | Sequence[int], split: str | None = None) -> Manifest:
        """Some samples, in the given order, as a manifest with ids of its own."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        return Manifest(
            root=self.root,
            split=split or self.split,
            paths=tuple(self.paths[i] for i in ids),
            heights=self.heights[ids],
            widths=self.widths[ids],
            digests=self.digests[ids],
            targets=self.targets.subset(ids),
            class_names=self.class_names,
        )

    def save(self, path: Path) -> None:
        """Write an npz file that holds no pickle, atomically."""
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "root": np.array(str(self.root)),
            "split": np.array(self.split),
            "paths": np.array(self.paths, dtype=np.str_),
            "heights": self.heights,
            "widths": self.widths,
            "digests": self.digests,
            "class_names": np.array(self.class_names, dtype=np.str_),
        }
        arrays |= {f"targets.{name}": array for name, array in self.targets.to_arrays().items()}
        with atomic_path(path) as unfinished, unfinished.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: Path, root: Path | None = None) -> Manifest:
        """Read what `save` wrote; `root` replaces the stored one where the files have moved.

        Raises:
            ValueError: The file is no manifest or is damaged.
            FileNotFoundError: There is no such file.
        """
        arrays = _read_npz(path)
        if arrays is None or int(arrays.get("format", np.array(0))) != _FORMAT:
            raise ValueError(
                f"{path} is not a manifest of this version or is damaged: delete it to have it made again"
            )
        prefix = "targets."
        targets = {
            name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
        }
        return cls(
            root=root or Path(str(arrays["root"])),
            split=str(arrays["split"]),
            paths=tuple(arrays["paths"].tolist()),
            heights=arrays["heights"],
            widths=arrays["widths"],
            digests=arrays["digests"],
            targets=TargetTable.from_arrays(targets),
            class_names=tuple(arrays["class_names"].tolist()),
        )


class Headers(NamedTuple):
    """Columns read from the files' headers, each (N,): int32, int32, uint64."""

    heights: np.ndarray
    widths: np.ndarray
    digests: np.ndarray


def read_headers(
    root: Path, entries: Sequence[FileEntry], *, cache_dir: Path, label: str, progress: bool = True
) -> Headers:
    """Sizes and digests of the listed files, from the cache if no file was added, removed or changed since.

    Args:
        root: Directory that the entries are relative to.
        entries: The listing.
        cache_dir: Where the scan is kept, by the absolute path of `root` and `label`.
        label: The split's name.
        progress: Show a progress bar for large sets.
    """
    listing = _listing_digest(entries)
    cached = cache_dir / "headers" / f"{cache_key(str(root.resolve()), label)}.npz"
    with locked(cached):
        arrays = _read_npz(cached) if cached.is_file() else None
        if arrays is not None and str(arrays.get("listing")) == listing:
            return Headers(arrays["heights"], arrays["widths"], arrays["digests"])
        headers = _scan(root, entries, label, progress and len(entries) >= _SHOW_PROGRESS_FROM)
        with atomic_path(cached) as unfinished, unfinished.open("wb") as stream:
            np.savez(stream, listing=np.array(listing), **headers._asdict())
    num_unreadable = int((headers.heights == 0).sum())
    if num_unreadable:
        first = entries[int(np.flatnonzero(headers.heights == 0)[0])].path
        logger.warning(
            "%s: %d of %d pictures have an unreadable header, first %s (`python -m image_classification verify` "
            "names all that is broken)",
            root, num_unreadable, len(entries), first,
        )  # fmt: skip
    return headers


def _listing_digest(entries: Sequence[FileEntry]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for entry in entries:
        line = f"{entry.path}\0{entry.num_bytes}\0{entry.mtime_ns}\n"
        state.update(line.encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def _scan(root: Path, entries: Sequence[FileEntry], label: str, progress: bool) -> Headers:
    """Read every header, in threads."""
    prefix = f"{root}/"

    def read_chunk(start: int) -> list[tuple[int, int, int]]:
        return [read_header(prefix + entry.path) for entry in entries[start : start + _CHUNK]]

    rows: list[list[tuple[int, int, int]]] = []
    with (
        ThreadPoolExecutor(_NUM_THREADS) as pool,
        progress_bar(f"scanning {label}", len(entries), progress) as advance,
    ):
        for chunk in pool.map(read_chunk, range(0, len(entries), _CHUNK)):
            rows.append(chunk)
            advance(len(chunk))
    columns = list(zip(*itertools.chain.from_iterable(rows), strict=True)) or [(), (), ()]
    heights, widths, digests = columns
    return Headers(
        np.array(heights, np.int64).clip(0, 2**31 - 1).astype(np.int32),
        np.array(widths, np.int64).clip(0, 2**31 - 1).astype(np.int32),
        np.array(digests, np.uint64),
    )


def _read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an npz file, never unpickled; None if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"the manifest {path} does not exist") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
