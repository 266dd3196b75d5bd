"""Similarity of a heat-map between two networks: rank correlation and structural similarity.

Both compare maps as in Adebayo et al. ("Sanity checks for saliency maps", NeurIPS 2018, section 3): Spearman's rank
correlation of the pixels (scipy), and SSIM (Wang et al. 2004; torchmetrics) of the maps scaled by their largest
magnitude. 1 means that nothing moved.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classification.extras import optional_import

# Side of SSIM's Gaussian window of σ = 1.5, as published.
_WINDOW = 11


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return Spearman's ρ of the pixels of two maps; ties get their mean rank.

    Args:
        first: (H, W).
        second: (H, W).

    Returns:
        ρ in [−1, 1]; NaN if a map is constant or not finite, since its pixels have no order.
    """
    for values in (first, second):
        if not np.isfinite(values).all() or values.min() == values.max():
            return math.nan
    with optional_import():
        from scipy.stats import spearmanr
    return float(spearmanr(first, second, axis=None).statistic)


def structural_similarity(first: Tensor, second: Tensor, *, signed: bool) -> Tensor:
    """Return the SSIM of pairs of maps.

    Args:
        first: (N, H, W) with H, W ≥ 11; each map is scaled by its largest magnitude first.
        second: (N, H, W), of the other network.
        signed: Maps may be negative, and then range over [−1, 1] instead of [0, 1].

    Returns:
        (N,) float64; NaN if a map is not finite or is zero everywhere.

    Raises:
        ValueError: Maps are smaller than SSIM's window.
    """
    if min(first.shape[1:]) < _WINDOW:
        raise ValueError(
            f"maps of {first.shape[1]}×{first.shape[2]} pixels are smaller than SSIM's window of {_WINDOW}: give "
            "larger images"
        )
    largest = [maps.double().abs().amax((1, 2)) for maps in (first, second)]
    sound = torch.isfinite(largest[0]) & torch.isfinite(largest[1]) & (largest[0] > 0) & (largest[1] > 0)
    values = torch.full((len(first),), torch.nan, dtype=torch.float64, device=first.device)
    if not sound.any():
        return values
    with optional_import():
        from torchmetrics.functional.image import structural_similarity_index_measure
    scaled = [
        (maps.double() / size[:, None, None])[sound][:, None]
        for maps, size in zip((first, second), largest, strict=True)
    ]
    found = structural_similarity_index_measure(
        scaled[0], scaled[1], data_range=2.0 if signed else 1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    values[sound] = found
    return values
