"""Feature maps with a class per position (segmentation) as samples with one class each.

The discriminant is a sum over positions of what a channel says of the class of a whole image. Where every position has
a class of its own, positions take the place of images: some are drawn from the batch, each with its vector of channels
and its class. Targets are taken to the size of the feature map by nearest neighbour. A map without positions (after
global pooling) is compared with the shares of the classes in its image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Positions of a batch that are looked at, and the void class of PASCAL VOC and the like.
DEFAULT_POSITIONS = 512
VOID = 255


def drawn_positions(
    features: Tensor, classes: Tensor, num_positions: int = DEFAULT_POSITIONS
) -> tuple[Tensor, Tensor]:
    """Vectors of channels with their classes.

    Args:
        features: (N, C, …) of one feature map; tokens are positions in one row, (N, C, T).
        classes: (N, …) int64 class indices; negative ones and 255 are left out.
        num_positions: How many are drawn at most, the same ones from maps of the same size.

    Returns:
        (M, C) vectors and (M,) classes; or (N, C) and (N, L) shares of classes where the map has no positions that fit.
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
    """(N, …) class indices → (N, L) shares of the positions of every sample."""
    flat = classes.flatten(1)
    void = (flat < 0) | (flat == VOID)
    num_classes = int(flat.masked_fill(void, 0).max()) + 1
    one_hot = F.one_hot(flat.masked_fill(void, num_classes), num_classes + 1)[..., :num_classes]
    return one_hot.double().sum(1) / (~void).sum(1, keepdim=True).clamp(min=1)


def _fitting_size(positions: Sequence[int], target: Sequence[int]) -> tuple[int, ...] | None:
    """The size at which a feature map's positions are those of the targets; None where they are not."""
    if math.prod(positions) <= 1:
        return None
    if len(positions) == len(target):
        return tuple(positions)
    if len(positions) != 1 or len(target) != 2:
        return None
    # Tokens of an image, row by row; there may be a few more in front, such as a class token.
    for num_tokens in range(positions[0], max(positions[0] - 6, 1), -1):
        height = round(math.sqrt(num_tokens * target[0] / target[1]))
        if height and num_tokens % height == 0 and height * target[1] == num_tokens // height * target[0]:
            return height, num_tokens // height
    return None


def _resized(classes: Tensor, size: Sequence[int]) -> Tensor:
    """(N, …) class indices at another size, by nearest neighbour."""
    for dim, (new, old) in enumerate(zip(size, classes.shape[1:], strict=True), start=1):
        index = ((torch.arange(new, device=classes.device) + 0.5) * old / new).long()
        classes = classes.index_select(dim, index.clamp(max=old - 1))
    return classes
