"""Tables of measured latencies as plain data, and the cache that keeps them.

Tables are files in the cache, one per device, PyTorch version, precision, memory format, number of threads and batch
size. A table is plain data: rank 0 measures and sends `to_plain()` to the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from image_classification.cache import cache_key, default_cache_dir, ensure_directory
from image_classification.config import check_choice, check_setting
from image_classification.file_writing import write_text
from image_classification.small_files import read_json

logger = logging.getLogger(__name__)

FEWEST_POINTS = 2
FEWEST_REPEATS = 3
AUTOCAST_TYPES = ("float16", "bfloat16")
_FORMAT = 1


class LatencyError(ValueError):
    """A latency table does not fit, or cannot be made."""


@dataclasses.dataclass(frozen=True)
class LatencySettings:
    """Settings of latency measurements.

    Attributes:
        batch_size: Images per batch; None for that of the example images.
        seconds: Approximate time for measuring; the grid is coarsened and the repeats are reduced to fit.
        points: Widths per dimension.
        repeats: Readings per entry; the median is used.
        cache_dir: Directory for tables; None for the default cache directory.
        reuse: Reuse cached measurements; otherwise everything is measured again and replaces them.
        autocast: Autocast dtype of the job, "float16" or "bfloat16": layers are timed in this dtype, networks under
            autocast.
    """

    batch_size: int | None = None
    seconds: float = 60.0
    points: int = 4
    repeats: int = 7
    cache_dir: Path | None = None
    reuse: bool = True
    autocast: str | None = None

    def __post_init__(self) -> None:
        check_setting(self.points >= FEWEST_POINTS, "points", self.points, f"give at least {FEWEST_POINTS}")
        check_setting(
            self.repeats >= FEWEST_REPEATS, "repeats", self.repeats, f"give at least {FEWEST_REPEATS}"
        )
        check_setting(self.seconds > 0, "seconds", self.seconds, "must be positive")
        check_choice("autocast", str(self.autocast), ["None", *AUTOCAST_TYPES])
        positive = self.batch_size is None or self.batch_size >= 1
        check_setting(positive, "batch_size", self.batch_size, "give at least 1")


#: (share of the widths, seconds measured, seconds predicted) of the whole network.
Anchor = tuple[float, float, float]


class FittedParts(TypedDict):
    """Fields of a `LatencyTable` that are fitted to the whole network."""

    fixed: float
    scale: float
    per_element: float
    anchors: tuple[Anchor, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Seconds of one kernel at (out width, in width)."""

    out_widths: tuple[int, ...]
    in_widths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """All data needed for a prediction.

    Attributes:
        identity: Device, versions and settings the table is valid for.
        grids: Kernel shape → measured grid.
        layers: Name of a contraction in the network → kernel shape.
        fixed: Seconds that do not depend on the widths.
        scale: Seconds in the network per second measured in isolation.
        per_element: Seconds per element moved by the other operators.
        anchors: Readings of the whole network.
    """

    identity: Mapping[str, Any]
    grids: Mapping[str, Grid]
    layers: Mapping[str, str]
    fixed: float
    scale: float
    per_element: float
    anchors: tuple[Anchor, ...]

    def to_plain(self) -> dict[str, Any]:
        """Return the table as JSON-able data."""
        plain = dataclasses.asdict(self)
        return {"format": _FORMAT, **json.loads(json.dumps(plain))}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LatencyTable:
        """Build a table from the output of `to_plain`.

        Raises:
            LatencyError: `plain` does not have that form, or has another version.
        """
        try:
            if plain["format"] != _FORMAT:
                raise LatencyError(f"latency table of format {plain['format']}; this version reads {_FORMAT}")
            return cls(
                identity=dict(plain["identity"]),
                grids={key: _grid_from(grid) for key, grid in plain["grids"].items()},
                layers=dict(plain["layers"]),
                fixed=float(plain["fixed"]),
                scale=float(plain["scale"]),
                per_element=float(plain["per_element"]),
                anchors=_anchors_from(plain["anchors"]),
            )
        except (KeyError, TypeError) as error:
            raise LatencyError(f"not a latency table ({error!r}): measure it again") from error

    @property
    def digest(self) -> str:
        """Return a hash of the table's contents, equal on all ranks that predict alike."""
        return hashlib.sha256(json.dumps(self.to_plain(), sort_keys=True).encode()).hexdigest()[:16]


def _grid_from(plain: Mapping[str, Any]) -> Grid:
    rows = tuple(tuple(float(value) for value in row) for row in plain["seconds"])
    return Grid(tuple(plain["out_widths"]), tuple(plain["in_widths"]), rows)


class TableCache:
    """Cache of earlier measurements on this device: one JSON file per identity."""

    def __init__(self, settings: LatencySettings, identity: Mapping[str, Any]) -> None:
        directory = (settings.cache_dir or default_cache_dir()) / "latency"
        ensure_directory(directory)
        self._path = directory / f"{cache_key(sorted(identity.items()))}.json"
        self._identity = identity
        self.grids: dict[str, Grid] = {}
        self.networks: dict[str, FittedParts] = {}
        if settings.reuse and self._path.is_file():
            self._load()

    def _load(self) -> None:
        try:
            plain = read_json(self._path, "the latency table")
            if plain["format"] == _FORMAT:
                self.grids = {key: _grid_from(grid) for key, grid in plain["grids"].items()}
                self.networks = {key: _parts_from(parts) for key, parts in plain["networks"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning("latency table %s cannot be read (%r): measuring again", self._path, error)
            self.grids = {}
            self.networks = {}

    def add_grids(self, grids: Mapping[str, Grid]) -> None:
        """Store measured grids of kernels."""
        self.grids.update(grids)
        self._save()

    def add_network(self, key: str, parts: FittedParts) -> None:
        """Store the fitted parts of a network."""
        self.networks[key] = parts
        self._save()

    def _save(self) -> None:
        plain = {
            "format": _FORMAT,
            "identity": dict(self._identity),
            "grids": {key: dataclasses.asdict(grid) for key, grid in sorted(self.grids.items())},
            "networks": self.networks,
        }
        write_text(self._path, json.dumps(plain, indent=1))


def _parts_from(plain: Mapping[str, Any]) -> FittedParts:
    return {
        "fixed": float(plain["fixed"]),
        "scale": float(plain["scale"]),
        "per_element": float(plain["per_element"]),
        "anchors": _anchors_from(plain["anchors"]),
    }


def _anchors_from(plain: Iterable[Sequence[float]]) -> tuple[Anchor, ...]:
    return tuple((float(share), float(measured), float(predicted)) for share, measured, predicted in plain)
