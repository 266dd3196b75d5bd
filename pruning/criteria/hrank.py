"""Rank of feature maps: Lin et al., "HRank: filter pruning using high-rank feature map" (CVPR 2020).

score_c = mean over images of rank(X_c), X_c the H × W map of channel c (the paper's eq. 8). The paper observes that the
mean hardly depends on the images, so a few per batch suffice, which bounds the cost: one singular value decomposition
per channel and image.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from image_classification.config import check_setting
from pruning.criteria.criterion import Average, FeatureCriterion, Features, register_criterion

_BLOCK_ELEMENTS = 1 << 22


def mean_ranks(features: Tensor) -> Tensor:
    """Compute the mean rank of each channel's maps.

    Args:
        features: (N, C, H, W); other layouts (N, C, …) are treated as one row per image, so rank 0 or 1.

    Returns:
        (C,) float64.
    """
    maps = features.float()
    if maps.dim() != 4:
        maps = maps.reshape(maps.shape[0], maps.shape[1], 1, -1)
    matrices = maps.transpose(0, 1).flatten(0, 1)
    per_block = max(1, _BLOCK_ELEMENTS // max(1, matrices[0].numel()))
    ranks = torch.cat([torch.linalg.matrix_rank(block) for block in matrices.split(per_block)])
    return ranks.view(maps.shape[1], -1).double().mean(1)


@register_criterion("hrank")
class HRank(FeatureCriterion):
    """Mean rank over the first images of every batch.

    Args:
        features: "pre" as published, though the paper uses maps after batch norm and ReLU for some networks.
        num_images: Images per batch.
    """

    average: ClassVar[Average] = "batches"

    def __init__(self, features: Features = "pre", num_images: int = 4) -> None:
        super().__init__(features)
        check_setting(num_images >= 1, "num_images", num_images, "give at least 1")
        self.num_images = num_images

    def score(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return mean ranks, (C,)."""
        return mean_ranks(features[: self.num_images])
