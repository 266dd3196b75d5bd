"""The manifest of a split: path, raw size, quick identity and target of every sample, nothing decoded.

It makes the data plan possible: crop windows are computed on the host from the raw sizes, and a loader only has to
transport sample ids (rows of the manifest). Files are listed and their headers read once; `scan.py` caches the result
and keeps it up to date.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from image_classification.data.arrays import read_npz, write_npz
from image_classification.data.paths import Paths
from image_classification.data.scan import scan_list
from image_classification.data.targets import TargetTable

_FORMATS = (1, 2)  # version 1 stores paths as an array of strings
#: Errors raised when arrays are missing or of another type.
_NO_MANIFEST = (KeyError, ValueError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True, eq=False)
class Manifest:
    """One split of a data set.

    Attributes:
        root: Directory that `paths` are relative to.
        split: "train", "val" or "calibration".
        paths: N POSIX paths, kept as `Paths`.
        heights, widths: (N,) int32 raw pixels as stored: EXIF orientation is ignored, as in every backend. 0 × 0 for a
            file whose header cannot be read; the loader's policy handles it.
        digests: (N,) uint64 quick identity of each file, from its length and first KiB.
        targets: Labels, boxes and masks by sample id.
        class_names: Names by class index.
        intact: (N,) bool, see `imagefile.Header`; None if unknown.
    """

    root: Path
    split: str
    paths: Sequence[str]
    heights: np.ndarray
    widths: np.ndarray
    digests: np.ndarray
    targets: TargetTable
    class_names: tuple[str, ...]
    intact: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", Paths.of(self.paths))
        lengths = {name: len(getattr(self, name)) for name in ("heights", "widths", "digests", "targets")}
        if any(length != len(self.paths) for length in lengths.values()):
            raise ValueError(f"columns of different lengths: {len(self.paths)} paths, {lengths}")

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, sample_id: int) -> Path:
        """Return the path of a sample's file."""
        return self.root / self.paths[sample_id]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hexadecimal digest of everything learned from: paths, targets, sizes, file identities; not of the
        root.
        """
        state = hashlib.blake2b(digest_size=16)
        for names in (self.paths, self.class_names):
            state.update(Paths.of(names).joined[:-1].tobytes())
            state.update(b"\1")
        columns = {"heights": self.heights, "widths": self.widths, "digests": self.digests}
        columns |= self.targets.to_arrays()
        for name, array in sorted(columns.items()):
            state.update(name.encode())
            state.update(f"{array.dtype.str}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()

    def subset(self, sample_ids: np.ndarray | Sequence[int], split: str | None = None) -> Manifest:
        """Return some samples, in the given order, as a manifest with new ids."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        return Manifest(
            root=self.root,
            split=split or self.split,
            paths=Paths.of(self.paths).subset(ids),
            heights=self.heights[ids],
            widths=self.widths[ids],
            digests=self.digests[ids],
            targets=self.targets.subset(ids),
            class_names=self.class_names,
            intact=None if self.intact is None else self.intact[ids],
        )

    def in_classes(self, class_names: Sequence[str], places: Sequence[int]) -> Manifest:
        """Return the same samples with labels in other classes: class i of this manifest becomes class `places[i]`."""
        targets = self.targets.renumbered(places, len(class_names))
        return dataclasses.replace(self, targets=targets, class_names=tuple(class_names))

    def save(self, path: Path) -> None:
        """Write an npz file without pickles, atomically."""
        arrays: dict[str, np.ndarray] = {
            "format": np.array(_FORMATS[-1]),
            "root": np.array(str(self.root)),
            "split": np.array(self.split),
            **Paths.of(self.paths).to_arrays("paths"),
            "heights": self.heights,
            "widths": self.widths,
            "digests": self.digests,
            "class_names": np.array(self.class_names, dtype=np.str_),
        }
        if self.intact is not None:
            arrays["intact"] = self.intact
        arrays |= {f"targets.{name}": array for name, array in self.targets.to_arrays().items()}
        write_npz(path, arrays)

    @classmethod
    def load(cls, path: Path, root: Path | None = None) -> Manifest:
        """Read a file written by `save`; `root` replaces the stored root if the files have moved.

        Raises:
            ValueError: The file is not a manifest, or is damaged.
            FileNotFoundError: The file does not exist.
        """
        arrays = read_npz(path)
        try:
            if arrays is not None and int(arrays["format"]) in _FORMATS:
                return cls._from_arrays(arrays, root)
        except _NO_MANIFEST:
            pass
        raise ValueError(
            f"{path} is not a manifest of this version or is damaged: delete it to have it made again"
        )

    @classmethod
    def _from_arrays(cls, arrays: dict[str, np.ndarray], root: Path | None) -> Manifest:
        prefix = "targets."
        targets = {
            name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
        }
        return cls(
            root=root or Path(str(arrays["root"])),
            split=str(arrays["split"]),
            paths=Paths.from_arrays(arrays, "paths") if "paths.ends" in arrays else arrays["paths"].tolist(),
            heights=arrays["heights"],
            widths=arrays["widths"],
            digests=arrays["digests"],
            targets=TargetTable.from_arrays(targets),
            class_names=tuple(arrays["class_names"].tolist()),
            intact=arrays.get("intact"),
        )


def scan_manifest(
    root: Path,
    split: str,
    paths: Sequence[str],
    targets: TargetTable,
    class_names: Sequence[str],
    *,
    cache_dir: Path,
    rescan: bool = False,
    progress: bool = True,
) -> Manifest:
    """Build the manifest of a split whose files and targets are known, for layouts with file lists.

    Args:
        root: Directory that the paths are relative to.
        split: "train" or "val".
        paths: N POSIX paths.
        targets: Targets of the N files, in their order.
        class_names: Names by class index.
        cache_dir: Directory for the header scan.
        rescan: Check every file, even if no directory's modification time has changed.
        progress: Show a progress bar for large sets.

    Raises:
        FileNotFoundError: A file is missing.
    """
    headers = scan_list(
        root,
        paths,
        listed_in=f"the list of {split} images",
        cache_dir=cache_dir,
        label=split,
        rescan=rescan,
        progress=progress,
    )
    return Manifest(root, split, paths, **headers._asdict(), targets=targets, class_names=tuple(class_names))
