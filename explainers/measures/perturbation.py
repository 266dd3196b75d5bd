"""Changes of a prediction as pixels are removed or restored in the order of a heat-map, and on the box alone.

Deletion and insertion curves: Petsiuk et al. 2018 (RISE). Saliency metric: Dabkowski & Gal 2017, as CASM uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from explainers.measures.localization import Rectangle

Predict = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W) to logits (B, num_classes)."""

#: Number of equal portions of pixels at which curves are measured.
STEPS = 20
#: Smallest area share in the saliency metric; lower shares count as this (Dabkowski & Gal 2017).
SMALLEST_SHARE = 0.05


@torch.no_grad()
def deletion_curve(
    predict: Predict, images: Tensor, targets: Tensor, maps: Tensor, steps: int = STEPS
) -> Tensor:
    """Compute the target's probability while pixels are set to the mean colour, highest map values first.

    Args:
        predict: The network.
        images: (B, 3, H, W) normalised; the mean colour is 0.
        targets: (B,) int64.
        maps: (B, H, W); ties are broken in row order.
        steps: Number of equal portions.

    Returns:
        (B, steps + 1), starting with the whole image.
    """
    return _curve(predict, images, torch.zeros_like(images), targets, maps, steps)


@torch.no_grad()
def insertion_curve(
    predict: Predict, images: Tensor, targets: Tensor, maps: Tensor, steps: int = STEPS, blur: float = 5.0
) -> Tensor:
    """Compute the target's probability while a blurred image gets its sharp pixels back, highest map values first.

    Arguments and result as `deletion_curve`; `blur` is the Gaussian's standard deviation for an image of 224 pixels,
    others in proportion.
    """
    sigma = blur * images.shape[-1] / 224
    radius = min(max(math.ceil(3 * sigma), 1), min(images.shape[2:]) - 1)
    blurred = gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
    return _curve(predict, blurred, images, targets, maps, steps)


def curve_area(curve: Tensor) -> Tensor:
    """Return the area under curves (B, n) over [0, 1] by the trapezoidal rule: (B,)."""
    return torch.trapezoid(curve.double(), dx=1 / (curve.shape[1] - 1))


def _curve(
    predict: Predict, before: Tensor, after: Tensor, targets: Tensor, maps: Tensor, steps: int
) -> Tensor:
    """Compute the target's probability while `before` turns into `after`, pixel by pixel in descending order of the
    map.
    """
    batch = len(maps)
    pixels = maps[0].numel()
    order = maps.reshape(batch, -1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(pixels, device=maps.device).expand_as(order)
    )
    ranks = ranks.view(batch, 1, *maps.shape[1:])
    probabilities = []
    for step in range(steps + 1):
        changed = ranks < round(pixels * step / steps)
        logits = predict(torch.where(changed, after, before))
        probabilities.append(logits.softmax(1).gather(1, targets[:, None])[:, 0])
    return torch.stack(probabilities, dim=1)


@torch.no_grad()
def saliency_metric(
    predict: Predict, images: Tensor, targets: Tensor, rectangles: Sequence[Rectangle]
) -> Tensor:
    """Compute log max(area share, `SMALLEST_SHARE`) − log p(target | the rectangle's crop, resized); lower is better.

    Args:
        predict: The network.
        images: (B, 3, H, W).
        targets: (B,) int64.
        rectangles: One per image; an empty one stands for the whole image.

    Returns:
        (B,) float64.
    """
    height, width = images.shape[2:]
    crops, areas = [], []
    for image, rectangle in zip(images, rectangles, strict=True):
        box = rectangle if rectangle.area else Rectangle(0, 0, width, height)
        crop = image[None, :, box.top : box.bottom, box.left : box.right]
        crops.append(F.interpolate(crop, size=(height, width), mode="bilinear", align_corners=False))
        areas.append(max(box.area / (height * width), SMALLEST_SHARE))
    log_p = predict(torch.cat(crops)).double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    return torch.tensor(areas, dtype=torch.float64, device=log_p.device).log() - log_p
