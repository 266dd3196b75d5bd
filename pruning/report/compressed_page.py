"""The page of `pruning compress`: the networks side by side, and their trade-off curve."""

from __future__ import annotations

import math

import jinja2
from matplotlib.figure import Figure

from image_classification.plain_data import Plain
from pruning.costs import cost_named
from pruning.report.charts import BLUE, MUTED, both


def render(plain: Plain) -> str:
    """Render the page as one HTML file.

    Args:
        plain: The verb's JSON output.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pruning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = plain["networks"]
    return environment.get_template("compressed.html.j2").render(
        plain=plain,
        title="Compressed without training",
        metrics=list(rows[-1]["costs"]),
        names={metric: cost_named(metric).short for metric in rows[-1]["costs"]},
        labelled="top1" in rows[0],
        timed="milliseconds" in rows[0],
        interval=1.96 * math.sqrt(0.8 * 0.2 / plain["num_judged"]),
        percent=lambda share: f"{100 * share:.1f} %",
        share=lambda row, metric: f"{_share(row, metric):.3f}",
        chart=_curve(plain) if len(rows) > 2 else None,
    )


def _share(row: Plain, metric: str) -> float:
    """Return the remaining share of a cost."""
    before, now = row["costs"][metric] if "costs" in row else (1.0, 1.0)
    return float(now / before)


def _curve(plain: Plain) -> dict[str, str]:
    """Plot accuracy, or agreement with the original, over the cost of the budgets."""
    rows = plain["networks"]
    (metric,) = rows[-1]["budget"]
    key = "top1" if "top1" in rows[0] else "agreement"
    points = sorted((_share(row, metric), 100 * row[key]) for row in rows)

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [cost for cost, _ in points], [value for _, value in points], color=BLUE, marker="o", markersize=4
        )
        for cost, value in points:
            axes.annotate(
                f"{value:.1f}",
                (cost, value),
                textcoords="offset points",
                xytext=(-5, 5),
                ha="right",
                color=MUTED,
            )
        axes.set_xlabel(f"share of the original's {cost_named(metric).short}")
        axes.set_title("top-1, %" if key == "top1" else "same class as the original, %")
        axes.margins(y=0.15)
        return figure

    return both("curve", draw)
