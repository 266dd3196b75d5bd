"""Heat-maps as images: overlays, and pages of them.

A map without negative values fades from the grey image into yellow; a signed map has one colour for evidence for the
class and one for evidence against it, and is transparent at zero. Each map is scaled by its own 99.5th percentile, so
that one bright pixel does not leave the rest dark.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classification.extras import optional_import
from image_classification.figure_writing import save_figure
from image_classification.file_writing import atomic_path

with optional_import():
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from PIL import Image

Pixels = NDArray[np.floating]
#: Side of a panel on a page.
CELL_INCHES = 1.7
_STRONGEST = 99.5
_MAX_OPACITY = 0.85


@dataclasses.dataclass(frozen=True)
class Panel:
    """One cell of a page.

    Attributes:
        title: Text above the cell; may have two lines.
        image: (H, W, 3) in [0, 1].
        heatmap: (H, W), drawn over the image; None shows only the image.
        signed: See `Attribution.signed`.
    """

    title: str
    image: Pixels
    heatmap: Pixels | None = None
    signed: bool = False


def colour_map(signed: bool) -> mpl.colors.Colormap:
    """Return the colour map: blue – white – red about zero, or black – purple – orange – yellow from zero."""
    return mpl.colormaps["RdBu_r" if signed else "inferno"]


def scaled(heatmap: Pixels, signed: bool) -> Pixels:
    """Scale a map to [0, 1] ([−1, 1] if signed) by the 99.5th percentile of its magnitude. Non-finite becomes 0."""
    sound = np.nan_to_num(heatmap.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    magnitudes = np.abs(sound) if signed else np.clip(sound, 0, None)
    strongest = float(np.percentile(magnitudes, _STRONGEST))
    if strongest <= 0:
        strongest = float(magnitudes.max())
    if strongest <= 0:
        return np.zeros_like(sound)
    return np.clip(sound / strongest, -1 if signed else 0, 1)


def overlay(image: Pixels, heatmap: Pixels, signed: bool) -> Pixels:
    """Draw a heat-map over a greyed image, so that colours come from the map alone.

    Args:
        image: (H, W, 3) in [0, 1].
        heatmap: (H, W).
        signed: See `Attribution.signed`.

    Returns:
        (H, W, 3) in [0, 1]. Where the map is 0 the grey image shows through.
    """
    values = scaled(heatmap, signed)
    grey = np.repeat((image @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    grey = 0.15 + 0.7 * grey
    position = (values + 1) / 2 if signed else values
    colours = colour_map(signed)(position)[..., :3]
    opacity = _MAX_OPACITY * np.sqrt(np.abs(values))[..., None]
    blended: Pixels = (1 - opacity) * grey + opacity * colours
    return blended


def to_image(image: NDArray[np.floating], mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Convert a network's normalised input (3, H, W) to an image (H, W, 3) in [0, 1]."""
    pixels = image * np.asarray(std)[:, None, None] + np.asarray(mean)[:, None, None]
    shown: Pixels = np.clip(pixels.transpose(1, 2, 0), 0, 1)
    return shown


def save_image(path: Path, image: Pixels) -> None:
    """Write (H, W, 3) in [0, 1] as an 8-bit file; the suffix selects the format."""
    with atomic_path(path) as unfinished:
        Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).save(unfinished)


def save_grid(path: Path, rows: Sequence[Sequence[Panel]], *, title: str = "") -> None:
    """Write a page of panels: one row of panels per image, with titles and a colour bar for each kind of map.

    Args:
        path: Output file; its suffix selects the format.
        rows: Rows of panels, all of the same length.
        title: Title above the page.
    """
    columns = max(len(row) for row in rows)
    panels = itertools.chain.from_iterable(rows)
    kinds = sorted({panel.signed for panel in panels if panel.heatmap is not None})
    margin = 0.45 * bool(title) + 0.15
    figure = Figure(
        figsize=(columns * CELL_INCHES + 0.95 * len(kinds) + 0.2, len(rows) * (CELL_INCHES + 0.42) + margin),
        dpi=110,
    )
    FigureCanvasAgg(figure)
    widths = [1.0] * columns + [0.55 * 0.95 / CELL_INCHES] * len(kinds)
    grid = figure.add_gridspec(
        len(rows),
        columns + len(kinds),
        width_ratios=widths,
        left=0.01,
        right=0.97,
        bottom=0.01,
        top=1 - (margin + 0.27) / figure.get_figheight(),
        wspace=0.06,
        hspace=0.42 / CELL_INCHES,
    )
    for index, row in enumerate(rows):
        for column, panel in enumerate(row):
            axes = figure.add_subplot(grid[index, column])
            shown = panel.image
            if panel.heatmap is not None:
                shown = overlay(panel.image, panel.heatmap, panel.signed)
            axes.imshow(shown, interpolation="nearest")
            axes.set_title(panel.title, fontsize=7.5, pad=3)
            axes.axis("off")
    for index, signed in enumerate(kinds):
        _colour_bar(figure, grid[: min(len(rows), 2), columns + index], signed)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.12 / figure.get_figheight(), va="top")
    save_figure(figure, path)


def _colour_bar(figure: Figure, place: mpl.gridspec.SubplotSpec, signed: bool) -> None:
    """Draw the colour bar."""
    holder = figure.add_subplot(place)
    holder.axis("off")
    axes = holder.inset_axes((0.1, 0.05, 0.22, 0.9))
    scale = ScalarMappable(Normalize(-1 if signed else 0, 1), _opaque(signed))
    bar = figure.colorbar(scale, cax=axes, ticks=[-1, 0, 1] if signed else [0, 1])
    bar.ax.set_yticklabels(["against", "0", "for"] if signed else ["0", "high"], fontsize=7)
    bar.outline.set_linewidth(0.4)


def _opaque(signed: bool) -> LinearSegmentedColormap:
    """Return the colours as they appear over mid-grey."""
    values = np.linspace(-1 if signed else 0, 1, 256)
    grey = np.full((1, 256, 3), 0.5)
    strip = overlay(grey, values[None], signed)[0] if values.any() else grey[0]
    return LinearSegmentedColormap.from_list("over grey", strip)
