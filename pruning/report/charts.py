"""Charts of the report as inline SVG whose colours follow the page (light or dark), each in a wide and a narrow form.

matplotlib draws with placeholder colours that are then replaced by the page's CSS variables; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from image_classification.plain_data import Plain
from pruning.report.trajectory import Trajectory
from pruning.report.wording import number

#: Placeholder colour → CSS variable of the page.
_PALETTE = {
    "#0a0b0c": "--ink",
    "#0a0b0d": "--muted",
    "#0a0b0e": "--grid",
    "#0a0b0f": "--blue",
    "#0a0c0a": "--orange",
    "#0a0c0b": "--pale",
    "#0a0c0c": "--green",
}
INK, MUTED, GRID, BLUE, ORANGE, PALE, GREEN = _PALETTE
WIDE, NARROW = 9.2, 3.9
"""Widths in inches at 100 px per inch: text has its natural size on a desktop and on a phone."""
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.titlecolor": INK, "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False, "lines.linewidth": 1.6, "grid.linewidth": 0.8,
}  # fmt: skip
_COLOURS = "viridis"
_COLOURED = 1e-4  # share of the largest loss: the range that colours distinguish


def both(name: str, draw: Callable[[float], Figure]) -> dict[str, str]:
    """Draw a chart at both widths, as SVG elements whose ids begin with `name`."""
    with mpl.rc_context(_STYLE):
        return {
            form: _svg(f"{name}-{form}", draw(width)) for form, width in (("wide", WIDE), ("narrow", NARROW))
        }


def _svg(prefix: str, figure: Figure) -> str:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', text)
    for colour, variable in _PALETTE.items():
        text = text.replace(colour, f"var({variable})")
    # The viewBox is in points; it is shown at its natural width, but never wider than the page.
    return text.replace("<svg ", f'<svg class="{prefix.rpartition("-")[2]}" role="img" ', 1)


def trajectory(course: Trajectory, targets: Mapping[str, float]) -> dict[str, str] | None:
    """Plot accuracy, costs and calibration losses over iterations; each rewrite is a tick, each stage a band."""
    parts = [
        part
        for part, there in (
            ("accuracy", course.validation or course.training),
            ("cost", course.costs),
            ("loss", course.losses),
        )
        if there
    ]
    if not parts:
        return None

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.5 + 1.75 * len(parts)), layout="constrained")
        panels = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0])
        for part, axes in zip(parts, panels, strict=True):
            {"accuracy": _accuracy, "cost": _costs, "loss": _losses}[part](axes, course, targets)
            for iteration, _, _ in course.losses:
                axes.axvline(iteration, ymax=0.04, color=ORANGE, linewidth=1)
        _mark_stages(panels, course, width)
        panels[-1].set_xlabel("iteration (ticks at the bottom: rewrites)" if course.losses else "iteration")
        panels[-1].xaxis.set_major_locator(MaxNLocator(4 if width < 6 else 8, integer=True))
        return figure

    return both("trajectory", draw)


def _mark_stages(panels: Sequence[Axes], course: Trajectory, width: float) -> None:
    end = max((last for _, _, last in course.stages), default=1) or 1
    for axes in panels:
        axes.set_xlim(0, end)
        for _, first, _ in course.stages[1:]:
            axes.axvline(first, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for kind, first, last in course.stages:
        if last - first < 0.13 * end and width < 6:
            continue  # no room for its name
        panels[0].annotate(
            kind,
            ((first + last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 17),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=MUTED,
        )


def _accuracy(axes: Axes, course: Trajectory, _targets: Mapping[str, float]) -> None:
    name = {"top1": "top-1", "map": "mAP"}[course.headline]
    if course.training:
        axes.plot(*zip(*course.training, strict=True), color=PALE, linewidth=1.2, label="training batches")
    if course.validation:
        axes.plot(
            *zip(*course.validation, strict=True), color=BLUE, marker="o", markersize=3, label="validation"
        )
    axes.set_title(f"{name}, %")
    _legend(axes)


def _costs(axes: Axes, course: Trajectory, targets: Mapping[str, float]) -> None:
    colours = (BLUE, GREEN, ORANGE, MUTED)
    for colour, (metric, points) in zip(colours, course.costs.items(), strict=False):
        iterations, shares = zip(*points, strict=True)
        axes.plot(iterations, [100 * share for share in shares], color=colour, label=metric)
        if metric in targets:
            axes.axhline(100 * targets[metric], color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_ylim(0, 105)
    axes.set_title("cost, % of the original (dotted: budget)")
    if len(course.costs) > 1:
        _legend(axes)


def _losses(axes: Axes, course: Trajectory, _targets: Mapping[str, float]) -> None:
    iterations, before, after = (np.array(column, dtype=float) for column in zip(*course.losses, strict=True))
    axes.vlines(iterations, before, after, color=GRID, linewidth=1.5)
    axes.plot(iterations, before, "o", color=BLUE, markersize=3.5, label="before the rewrite")
    axes.plot(iterations, after, "o", color=ORANGE, markersize=3.5, label="right after it")
    axes.set_title("calibration loss")
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        ncols=2,
        fontsize=8,
        borderpad=0,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=1.0,
    )


def widths(rows: Sequence[Plain]) -> dict[str, str] | None:
    """Plot the channels of every layer: original in a pale colour, remaining in a dark one."""
    if not rows:
        return None

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.55 + 0.185 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(rows))
        before, after = [row["before"] for row in rows], [row["after"] for row in rows]
        axes.barh(places, before, color=PALE, height=0.72, label="before")
        axes.barh(places, after, color=BLUE, height=0.72, label="after")
        shown = [_shortened(row["layer"], 30 if width > 6 else 17) for row in rows]
        axes.set_yticks(places, shown, fontsize=7.5 if width > 6 else 7)
        for place, was, now in zip(places, before, after, strict=True):
            axes.annotate(
                f"{now} of {was}" if now != was else f"{was}",
                (was, float(place)),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.8,
                color=MUTED,
            )
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, max(before) * (1.1 if width > 6 else 1.3))
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("output channels")
        return figure

    return both("widths", draw)


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[-(length - 1) :]


def rewrites(shares: np.ndarray, groups: Sequence[str], numbers: Sequence[int]) -> dict[str, str] | None:
    """Plot the remaining share of each group's channels after each rewrite.

    Args:
        shares: (groups, rewrites) in [0, 1].
        groups: Names of the rows.
        numbers: Numbers of the rewrites.
    """
    if shares.shape[1] == 1:
        return _bars("rewrites", 100 * shares[:, 0], groups, "% of the channels left", (0.0, 100.0))
    columns = [str(each) for each in numbers]
    return _table_chart("rewrites", 100 * shares, groups, columns, "% of the channels left", (0.0, 100.0))


def _bars(
    name: str, values: np.ndarray, groups: Sequence[str], label: str, limits: tuple[float, float]
) -> dict[str, str] | None:
    """Plot one bar per group, for a run with a single rewrite: (groups,) values; logarithmic if the lower limit is
    positive.
    """
    if values.size == 0:
        return None

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.6 + 0.185 * len(groups)), layout="constrained")
        axes = figure.subplots()
        if limits[0] > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: number(value, 2)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.barh(range(len(groups)), values - limits[0], left=limits[0], color=BLUE, height=0.72)
        names = [_shortened(group, 30 if width > 6 else 17) for group in groups]
        axes.set_yticks(range(len(groups)), names, fontsize=7.5 if width > 6 else 7)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(*limits)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        return figure

    return both(name, draw)


def scores(values: np.ndarray, groups: Sequence[str], numbers: Sequence[int]) -> dict[str, str] | None:
    """Plot the median channel score of each group at each rewrite, (groups, rewrites); NaN where it was not scored."""
    sound = values[np.isfinite(values) & (values > 0)]
    if not len(sound):
        return None
    low, high = float(sound.min()), float(sound.max())
    if values.shape[1] == 1:
        label = "median score, logarithmic"
        sole = np.where(values[:, 0] > 0, values[:, 0], np.nan)
        return _bars("scores", sole, groups, label, (low / 2, max(high, 2 * low)))
    columns = [str(each) for each in numbers]
    return _table_chart("scores", values, groups, columns, "median score", (low, high), logarithmic=True)


def sensitivity(measured: Plain) -> dict[str, str] | None:
    """Plot how far the outputs move: a row per group, a column per removed share. None without a loss above 0.

    Args:
        measured: Output of `python -m pruning sensitivity`: `groups` with their `losses`, and the shares `removed`.
    """
    rows = measured["groups"]
    losses = np.array([row["losses"] for row in rows], dtype=float)
    sound = losses[np.isfinite(losses) & (losses > 0)]
    if not len(sound):
        return None
    # Values far below the largest loss differ only by rounding, so they get the lowest colour.
    high = float(sound.max())
    low = max(float(sound.min()), _COLOURED * high)
    coloured = np.where(np.isfinite(losses), losses.clip(min=low), np.nan)
    columns = [f"−{100 * share:g} %" for share in measured["removed"]]
    groups = [row["group"] for row in rows]
    return _table_chart(
        "sensitivity",
        coloured,
        groups,
        columns,
        "loss of the outputs",
        (low, high),
        axis="channels removed",
        logarithmic=True,
    )


def _table_chart(
    name: str,
    values: np.ndarray,
    groups: Sequence[str],
    columns: Sequence[str],
    label: str,
    limits: tuple[float, float],
    *,
    axis: str = "rewrite",
    logarithmic: bool = False,
) -> dict[str, str] | None:
    """Plot values as colours, (groups, columns); on a logarithmic scale they are positive, or NaN, which stays
    empty.
    """
    if values.size == 0:
        return None
    if logarithmic:
        values = np.log10(np.where(values > 0, values, np.nan))
        limits = float(np.log10(limits[0])), float(np.log10(limits[1]))

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.95 + 0.2 * len(groups)), layout="constrained")
        axes = figure.subplots()
        low, high = limits if limits[1] > limits[0] else (limits[0] - 0.5, limits[1] + 0.5)
        image = axes.imshow(
            values, aspect="auto", interpolation="nearest", cmap=_COLOURS, vmin=low, vmax=high
        )
        names = [_shortened(group, 30 if width > 6 else 17) for group in groups]
        axes.set_yticks(range(len(groups)), names, fontsize=7.5 if width > 6 else 7)
        step = max(1, -(-len(columns) // (20 if width > 6 else 8)))
        places = range(0, len(columns), step)
        axes.set_xticks(places, [columns[place] for place in places])
        axes.set_xlabel(axis)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", location="top", aspect=40, shrink=0.7)
        bar.set_label(label)
        bar.outline.set_visible(False)
        if logarithmic:
            bar.ax.xaxis.set_major_locator(MaxNLocator(3 if width < 6 else 5))
            bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: number(10**value, 2)))
        return figure

    return both(name, draw)
