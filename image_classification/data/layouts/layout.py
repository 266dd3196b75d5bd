"""Registry of data set layouts: how each one is recognised and opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from image_classification.data.dataset import Dataset
from image_classification.package_files import import_files_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """Options for opening a data set of any layout.

    Attributes:
        name: The set's name in reports, if the layout has no better one.
        cache_dir: Directory for results made once and reused: unpacked images, header scans.
        progress: Show progress bars for long operations.
        require_val: Whether a missing validation split is an error; otherwise that split is empty.
        rescan: Check every file, even if no directory's modification time has changed.
        difficult: Whether objects that VOC marks as difficult count; not used by other layouts.
    """

    name: str
    cache_dir: Path
    progress: bool = True
    require_val: bool = True
    rescan: bool = False
    difficult: bool = False


Recognise = Callable[[Path], bool]
Open = Callable[[Path, OpenOptions], Dataset]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One entry of the registry.

    Attributes:
        name: Unique name.
        description: Name in messages, as in "known layouts: …".
        recognise: Whether a directory (or a single file) is of this layout; looks at names only.
        open: Opens what `recognise` accepted.
        priority: Layouts are tried by decreasing priority, within a priority the latest registered first. Those of this
            package are below 0.
    """

    name: str
    description: str
    recognise: Recognise
    open: Open
    priority: int


#: Package whose modules register their layouts on import.
_PACKAGE = __name__.rpartition(".")[0]
_LAYOUTS: dict[str, Layout] = {}


def register_layout(
    name: str, *, recognise: Recognise, description: str, priority: int = 0
) -> Callable[[Open], Open]:
    """Decorator that registers a function `(path, options) -> Dataset`.

    Args:
        name, description, recognise, priority: See `Layout`.

    Raises:
        ValueError: The name is taken.
    """

    def enter(open_layout: Open) -> Open:
        if name in _LAYOUTS:
            raise ValueError(f"there already is a layout called {name!r}")
        _LAYOUTS[name] = Layout(name, description, recognise, open_layout, priority)
        return open_layout

    return enter


def layouts() -> list[Layout]:
    """Return all layouts, in the order in which they are tried."""
    import_files_of(_PACKAGE)
    latest_first = reversed(_LAYOUTS.values())
    return sorted(latest_first, key=lambda layout: -layout.priority)
