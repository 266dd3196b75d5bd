"""CASM's decoder: from a classifier's features at several depths to a mask (Żołna et al. 2020, section 4).

For a ResNet-50, its tensors have the names and shapes of the published program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Upsample = Literal["nearest", "bilinear"]
#: Published mode for enlarging masks to the images' size.
UPSAMPLE: Upsample = "nearest"
#: Published number of channels that each stage is reduced to.
WIDTH = 64


class CasmDecoder(nn.Module):
    """The decoder: a 1×1 convolution, BN and ReLU per stage, enlargement to the base's resolution, one 3×3 convolution.

    Args:
        channels: Channels of the base (after the stem) and of the stages, shallow to deep; at least the base and one
            stage.
        width: Channels that each stage is reduced to.
    """

    def __init__(self, channels: Sequence[int], width: int = WIDTH) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 1 or width < 1:
            raise ValueError(
                f"a CASM decoder needs features of at least two depths, each with channels, not {list(channels)}"
            )
        self.channels = tuple(channels)
        self.width = width
        for index, count in enumerate(channels[1:], 1):
            reduce = nn.Sequential(
                nn.Conv2d(count, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
            )
            self.add_module(f"conv1x1_{index}", reduce)
        joined = channels[0] + width * (len(channels) - 1)
        self.final = nn.Sequential(nn.Conv2d(joined, 1, 3, padding=1), nn.Sigmoid())

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Predict the part of the image to remove.

        Args:
            features: (N, C_i, h_i, w_i), the base first.

        Returns:
            (N, 1, h_0, w_0) in (0, 1).
        """
        if len(features) != len(self.channels):
            raise ValueError(
                f"the decoder reads {len(self.channels)} feature maps, {len(features)} were given"
            )
        base, *stages = features
        parts = [base]
        for index, stage in enumerate(stages, 1):
            reduced = self.get_submodule(f"conv1x1_{index}")(stage)
            parts.append(F.interpolate(reduced, size=base.shape[2:], mode="bilinear", align_corners=False))
        logits: Tensor = self.final(torch.cat(parts, dim=1))
        return logits


def enlarged(mask: Tensor, size: torch.Size | tuple[int, ...], upsample: Upsample = UPSAMPLE) -> Tensor:
    """Enlarge a mask (N, 1, h, w) to (N, 1, H, W), float32, by nearest neighbour or bilinearly."""
    corners = None if upsample == "nearest" else False
    return F.interpolate(mask.float(), size=tuple(size), mode=upsample, align_corners=corners)
