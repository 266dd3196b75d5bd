"""Per-position classes (segmentation): feature maps are sampled into vectors with one class each.

The discriminant sums over positions how informative a channel is about the class of a whole image. If every position
has its own class, positions take the place of images: some are sampled from the batch, each with its channel vector and
its class. Targets are resized to the feature map by nearest neighbour. A map without positions (after global pooling)
is compared with the shares of the classes in its image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Number of positions sampled per batch, and the void class of PASCAL VOC and similar data sets.
DEFAULT_POSITIONS = 512
VOID = 255


def drawn_positions(
    features: Tensor, classes: Tensor, num_positions: int = DEFAULT_POSITIONS
) -> tuple[Tensor, Tensor]:
    """Sample channel vectors with their classes.

    Args:
        features: One feature map (N, C, …); tokens are positions in a single row, (N, C, T).
        classes: (N, …) int64 class indices; negative indices and 255 are left out.
        num_positions: Largest number of sampled positions; maps of the same size use the same ones.

    Returns:
        (M, C) vectors and (M,) classes; or (N, C) and (N, L) class shares if the map's positions do not correspond to
            the targets'.
    """
    size = _fitting_size(features.shape[2:], classes.shape[1:])
    if size is None:
        return features.flatten(2).mean(2), class_shares(classes)
    maps = features[:, :, -math.prod(size) :] if features.dim() == 3 else features
    vectors = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    labels = _resized(classes, size).flatten()
    chosen = torch.nonzero((labels >= 0) & (labels != VOID)).flatten()
    if len(chosen) > num_positions:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(chosen), generator=generator)[:num_positions]
        chosen = chosen[order.to(chosen.device)]
    return vectors[chosen], labels[chosen]


def class_shares(classes: Tensor) -> Tensor:
    """Convert class indices (N, …) to each sample's class shares, (N, L)."""
    flat = classes.flatten(1)
    void = (flat < 0) | (flat == VOID)
    num_classes = int(flat.masked_fill(void, 0).max()) + 1
    one_hot = F.one_hot(flat.masked_fill(void, num_classes), num_classes + 1)[..., :num_classes]
    return one_hot.double().sum(1) / (~void).sum(1, keepdim=True).clamp(min=1)


def _fitting_size(positions: Sequence[int], target: Sequence[int]) -> tuple[int, ...] | None:
    """Return the size at which a feature map's positions match those of the targets; None if they do not match."""
    if math.prod(positions) <= 1:
        return None
    if len(positions) == len(target):
        return tuple(positions)
    if len(positions) != 1 or len(target) != 2:
        return None
    # Image tokens, row by row; a few extra tokens, such as a class token, may precede them.
    for num_tokens in range(positions[0], max(positions[0] - 6, 1), -1):
        height = round(math.sqrt(num_tokens * target[0] / target[1]))
        if height and num_tokens % height == 0 and height * target[1] == num_tokens // height * target[0]:
            return height, num_tokens // height
    return None


def _resized(classes: Tensor, size: Sequence[int]) -> Tensor:
    """Resize class indices (N, …) by nearest neighbour."""
    for dim, (new, old) in enumerate(zip(size, classes.shape[1:], strict=True), start=1):
        index = ((torch.arange(new, device=classes.device) + 0.5) * old / new).long()
        classes = classes.index_select(dim, index.clamp(max=old - 1))
    return classes
