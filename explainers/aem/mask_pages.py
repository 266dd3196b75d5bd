"""Pages of selector masks: image, mask, masked image; centre and width of RBF masks drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explainers.plots import CELL_INCHES, Pixels
from image_classification.extras import optional_import
from image_classification.figure_writing import save_figure

with optional_import():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

_COLOUR = "#ff4fd8"


@dataclasses.dataclass(frozen=True)
class MaskedImage:
    """One row of a page.

    Attributes:
        title: The network's prediction for the image.
        masked_title: The prediction for the masked image.
        image, masked: (S, S, 3) in [0, 1].
        mask: (S, S) in [0, 1].
        binary: (S, S) bool, the binarised mask, for a column of its own.
        centre, width: Of an RBF mask in pixels (x to the right, y down), None for others.
    """

    title: str
    masked_title: str
    image: Pixels
    masked: Pixels
    mask: NDArray[np.floating]
    centre: tuple[float, float] | None = None
    width: float | None = None
    binary: NDArray[np.bool_] | None = None


def save_mask_page(path: Path, rows: Sequence[MaskedImage]) -> None:
    """Write a page with one row per image.

    A cross marks the centre of an RBF mask, the full circle its width σ (mask value 0.61) and the dashed one 2σ (0.14).

    Args:
        path: Output file; its suffix selects the format.
        rows: At least one.
    """
    columns = 3 + any(row.binary is not None for row in rows)
    figure = Figure(figsize=(columns * CELL_INCHES + 0.6, len(rows) * (CELL_INCHES + 0.36) + 0.1), dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows),
        columns,
        left=0.02,
        right=0.98,
        bottom=0.02,
        wspace=0.05,
        hspace=0.36 / CELL_INCHES,
        top=1 - 0.36 / figure.get_figheight(),
    )
    for index, row in enumerate(rows):
        left, middle, right, *further = (figure.add_subplot(grid[index, column]) for column in range(columns))
        left.imshow(row.image, interpolation="nearest")
        left.set_title(row.title, fontsize=7.5, pad=3)
        middle.imshow(row.mask, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        middle.set_title(f"mask, area {100 * row.mask.mean():.0f} %", fontsize=7.5, pad=3)
        right.imshow(row.masked, interpolation="nearest")
        right.set_title(row.masked_title, fontsize=7.5, pad=3)
        for axes in (left, middle, right, *further):
            axes.axis("off")
        for axes in (left, middle):
            _draw_rbf(axes, row)
        if further and row.binary is not None:
            further[0].imshow(row.binary, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            further[0].set_title(f"binarised, area {100 * row.binary.mean():.0f} %", fontsize=7.5, pad=3)
    save_figure(figure, path)


def _draw_rbf(axes: Axes, row: MaskedImage) -> None:
    if row.centre is None or row.width is None:
        return
    # Circles that leave the image must not change its extent.
    limits = axes.get_xlim(), axes.get_ylim()
    axes.plot(*row.centre, marker="+", color=_COLOUR, markersize=7, markeredgewidth=1.3)
    for factor, style in ((1, "-"), (2, "--")):
        axes.add_patch(
            Circle(row.centre, factor * row.width, fill=False, color=_COLOUR, linestyle=style, linewidth=0.9)
        )
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
