"""How far a network's explanations are from those of the network it was made from."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn

from explainers.attribution.method import create_method
from explainers.measures.movement import rank_correlation

METHODS = ("gradcam", "lrp")
_AT_ONCE = 64


def maps_of(model: nn.Module, method: str, images: Tensor, labels: Tensor) -> Tensor:
    """Return the heat-maps of the labelled classes, (N, H, W) on the host."""
    prepared = create_method(method).prepare(model, images[:1])
    parts = zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
    return torch.cat([prepared(shown, targets).map.cpu() for shown, targets in parts])


def drift(original: nn.Module, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare the maps of two networks on the same images.

    Args:
        original: The network before pruning.
        network: The pruned network.
        images: (N, 3, H, W).
        labels: (N,) classes whose maps are compared.

    Returns:
        For each method in `METHODS`: Spearman's ρ of the pixels, the distance of the maps' centres of mass in pixels
        (negative values count as zero), both as means over the images whose maps are not constant, and `…_compared`,
        their share.
    """
    figures: dict[str, float] = {}
    for method in METHODS:
        before, after = (maps_of(model, method, images, labels) for model in (original, network))
        pairs = list(zip(before.numpy(), after.numpy(), strict=True))
        correlations = [rank_correlation(one, two) for one, two in pairs]
        moved = (centres(before) - centres(after)).norm(dim=1).tolist()
        sound = [place for place, value in enumerate(correlations) if not math.isnan(value)]
        kept = [place for place in sound if not math.isnan(moved[place])]
        figures[f"{method}_correlation"] = _mean([correlations[place] for place in sound])
        figures[f"{method}_centre_px"] = _mean([moved[place] for place in kept])
        figures[f"{method}_compared"] = len(sound) / len(pairs)
    return figures


def centres(maps: Tensor) -> Tensor:
    """Return the centres of mass (N, 2) of maps (N, H, W), in pixels; NaN where nothing is positive."""
    mass = maps.double().clamp(min=0)
    total = mass.sum((1, 2))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in maps.shape[1:])
    down = (mass.sum(2) * rows).sum(1) / total
    across = (mass.sum(1) * columns).sum(1) / total
    return torch.stack([down, across], 1)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
