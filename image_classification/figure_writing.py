"""Writing of matplotlib figures: atomically, in the format given by the file's suffix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from image_classification.config import check
from image_classification.file_writing import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_figure(path: Path, flag: str) -> None:
    """Refuse a file name without a known format, before anything is computed.

    Raises:
        ConfigError: The name has no known format; the message names the flag.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    check(
        _format(path) in known,
        f"{flag} {path}: matplotlib writes no such format; the name may end in {', '.join(known)}",
    )


def save_figure(figure: Figure, path: Path, *, dpi: int | None = None) -> None:
    """Write a figure.

    Args:
        figure: The figure.
        path: Output file, with a name accepted by `check_figure`.
        dpi: Pixels per inch; the figure's own if None.

    Raises:
        OSError: As for `atomic_path`.
    """
    with atomic_path(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi or "figure", format=_format(path))


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()
