"""The widths of a network as a small image of bars, drawn at every rewrite."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pruning.engine.groups import Group

_BAR, _GAP, _HEIGHT = 8, 2, 96


def widths_image(groups: Sequence[Group]) -> torch.Tensor:
    """Draw widths as bars, one per group in order of execution: remaining channels dark, removed ones light.

    Args:
        groups: Groups with their current and original widths.

    Returns:
        (3, H, W) uint8, cheap enough to be drawn at every rewrite.
    """
    image = torch.full((3, _HEIGHT, max(1, len(groups)) * (_BAR + _GAP)), 255, dtype=torch.uint8)
    for number, group in enumerate(groups):
        left = number * (_BAR + _GAP)
        top = _HEIGHT - max(1, round(_HEIGHT * group.width / group.original_width))
        image[:, :, left : left + _BAR] = torch.tensor([219, 230, 243], dtype=torch.uint8)[:, None, None]
        image[:, top:, left : left + _BAR] = torch.tensor([43, 108, 176], dtype=torch.uint8)[:, None, None]
    return image
