"""Figures of matplotlib as files: whole or not at all, in the format that the name says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from image_classification.config import check
from image_classification.file_writing import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_figure(path: Path, flag: str) -> None:
    """Refuse a file's name that says no format, before anything is computed.

    Raises:
        ConfigError: Naming the flag.
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
        path: Its file, of a name that `check_figure` lets through.
        dpi: Pixels per inch; the figure's own where it is left out.

    Raises:
        OSError: As `atomic_path`.
    """
    with atomic_path(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi or "figure", format=_format(path))


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()
