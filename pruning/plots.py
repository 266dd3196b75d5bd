"""Pictures of channel scores and of widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pruning.groups import Group

_BAR, _GAP, _HEIGHT = 8, 2, 96


def widths_picture(groups: Sequence[Group]) -> torch.Tensor:
    """Widths as bars, one per group in order of execution: dark is what is left, light what has gone.

    Args:
        groups: Groups with their present and original widths.

    Returns:
        (3, H, W) uint8, cheap enough to be drawn at every rewrite.
    """
    picture = torch.full((3, _HEIGHT, max(1, len(groups)) * (_BAR + _GAP)), 255, dtype=torch.uint8)
    for number, group in enumerate(groups):
        left = number * (_BAR + _GAP)
        top = _HEIGHT - max(1, round(_HEIGHT * group.width / group.original_width))
        picture[:, :, left : left + _BAR] = torch.tensor([219, 230, 243], dtype=torch.uint8)[:, None, None]
        picture[:, top:, left : left + _BAR] = torch.tensor([43, 108, 176], dtype=torch.uint8)[:, None, None]
    return picture


def plot_scores(scores: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """One panel per criterion: every channel's score as a point, divided by the mean of its group.

    Args:
        scores: Criterion → group → scores.
        path: Where the picture goes.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    widest = max((len(groups) for groups in scores.values()), default=1)
    figure = Figure(figsize=(max(6.0, 0.28 * widest + 2), 3.6 * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), 1, squeeze=False)[:, 0]
    jitter = np.random.default_rng(0)
    for panel, (criterion, groups) in zip(panels, scores.items(), strict=True):
        for column, values in enumerate(groups.values()):
            points = np.asarray(values, dtype=np.float64)
            mean = points.mean() or 1.0
            x = column + jitter.uniform(-0.3, 0.3, len(points))
            panel.scatter(x, points / mean, s=5, alpha=0.5, color="#2b6cb0", linewidths=0)
            panel.hlines(
                np.median(points) / mean, column - 0.38, column + 0.38, color="#c05621", linewidth=1.5
            )
        panel.set_title(f"{criterion}: score ÷ mean of its group (bar: median)")
        panel.set_xticks(range(len(groups)), list(groups), rotation=90, fontsize=7)
        panel.set_xlim(-0.7, len(groups) - 0.3)
        panel.set_ylabel("relative score")
        panel.axhline(1.0, color="#a0aec0", linewidth=0.8, zorder=0)
        panel.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
