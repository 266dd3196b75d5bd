"""Heat-maps as pictures: overlays, and pages of them.

A map that is never negative fades from the grey picture into yellow; a signed one has its own colours for and against
the class, with zero exactly at the transparent middle. Each map is scaled by itself, by its 99.5th percentile, so that
one bright pixel does not leave the rest dark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.floating]
_STRONGEST = 99.5
_MAX_OPACITY = 0.85


@dataclasses.dataclass(frozen=True)
class Panel:
    """One cell of a page.

    Attributes:
        title: Above it; may have two lines.
        picture: (H, W, 3) in [0, 1].
        heatmap: (H, W), drawn over the picture; None shows the picture alone.
        signed: See `Attribution.signed`.
    """

    title: str
    picture: Picture
    heatmap: Picture | None = None
    signed: bool = False


def colour_map(signed: bool) -> mpl.colors.Colormap:
    """Blue – white – red about zero, or black – purple – orange – yellow from zero."""
    return mpl.colormaps["RdBu_r" if signed else "inferno"]


def scaled(heatmap: Picture, signed: bool) -> Picture:
    """A map in [0, 1] ([−1, 1] if signed), by the 99.5th percentile of its magnitude. What is not finite becomes 0."""
    sound = np.nan_to_num(heatmap.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    magnitudes = np.abs(sound) if signed else np.clip(sound, 0, None)
    strongest = float(np.percentile(magnitudes, _STRONGEST))
    if strongest <= 0:
        strongest = float(magnitudes.max())
    if strongest <= 0:
        return np.zeros_like(sound)
    return np.clip(sound / strongest, -1 if signed else 0, 1)


def overlay(picture: Picture, heatmap: Picture, signed: bool) -> Picture:
    """A heat-map over a picture that is greyed, so that colours mean the map alone.

    Args:
        picture: (H, W, 3) in [0, 1].
        heatmap: (H, W).
        signed: See `Attribution.signed`.

    Returns:
        (H, W, 3) in [0, 1]. Where the map is 0 the grey picture shows through.
    """
    values = scaled(heatmap, signed)
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    grey = 0.15 + 0.7 * grey
    position = (values + 1) / 2 if signed else values
    colours = colour_map(signed)(position)[..., :3]
    opacity = _MAX_OPACITY * np.sqrt(np.abs(values))[..., None]
    return (1 - opacity) * grey + opacity * colours


def to_picture(image: NDArray[np.floating], mean: Sequence[float], std: Sequence[float]) -> Picture:
    """A network's input (3, H, W), normalised, as a picture (H, W, 3) in [0, 1]."""
    pixels = image * np.asarray(std)[:, None, None] + np.asarray(mean)[:, None, None]
    return np.clip(pixels.transpose(1, 2, 0), 0, 1)


def save_picture(path: Path, picture: Picture) -> None:
    """Write (H, W, 3) in [0, 1] as an 8-bit file; the suffix says the format."""
    Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).save(path)


def save_grid(
    path: Path, rows: Sequence[Sequence[Panel]], *, title: str = "", cell_inches: float = 1.7
) -> None:
    """Write a page of panels: one row of panels per picture, with titles and a colour bar for each kind of map.

    Args:
        path: File; the suffix says the format.
        rows: Rows of the same length.
        title: Above the page.
        cell_inches: Side of a panel.
    """
    columns = max(len(row) for row in rows)
    kinds = sorted({panel.signed for row in rows for panel in row if panel.heatmap is not None})
    margin = 0.45 * bool(title) + 0.15
    figure = Figure(
        figsize=(columns * cell_inches + 0.95 * len(kinds) + 0.2, len(rows) * (cell_inches + 0.42) + margin),
        dpi=110,
    )
    FigureCanvasAgg(figure)
    widths = [1.0] * columns + [0.55 * 0.95 / cell_inches] * len(kinds)
    grid = figure.add_gridspec(
        len(rows), columns + len(kinds), width_ratios=widths, left=0.01, right=0.97, bottom=0.01,
        top=1 - (margin + 0.27) / figure.get_figheight(), wspace=0.06, hspace=0.42 / cell_inches,
    )  # fmt: skip
    for index, row in enumerate(rows):
        for column, panel in enumerate(row):
            axes = figure.add_subplot(grid[index, column])
            shown = (
                panel.picture
                if panel.heatmap is None
                else overlay(panel.picture, panel.heatmap, panel.signed)
            )
            axes.imshow(shown, interpolation="nearest")
            axes.set_title(panel.title, fontsize=7.5, pad=3)
            axes.axis("off")
    for index, signed in enumerate(kinds):
        _colour_bar(figure, grid[: min(len(rows), 2), columns + index], signed)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.12 / figure.get_figheight(), va="top")
    figure.savefig(path)


def _colour_bar(figure: Figure, place: mpl.gridspec.SubplotSpec, signed: bool) -> None:
    """What the colours mean."""
    holder = figure.add_subplot(place)
    holder.axis("off")
    axes = holder.inset_axes((0.1, 0.05, 0.22, 0.9))
    scale = ScalarMappable(Normalize(-1 if signed else 0, 1), _opaque(signed))
    bar = figure.colorbar(scale, cax=axes, ticks=[-1, 0, 1] if signed else [0, 1])
    bar.ax.set_yticklabels(["against", "0", "for"] if signed else ["0", "high"], fontsize=7)
    bar.outline.set_linewidth(0.4)


def _opaque(signed: bool) -> LinearSegmentedColormap:
    """The colours as they look over mid-grey."""
    values = np.linspace(-1 if signed else 0, 1, 256)
    grey = np.full((1, 256, 3), 0.5)
    strip = overlay(grey, values[None], signed)[0] if values.any() else grey[0]
    return LinearSegmentedColormap.from_list("over grey", strip)
