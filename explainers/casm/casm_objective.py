"""The loss of CASM's decoder and the logged statistics of its masks (Żołna et al. 2020, equations 3 to 7).

Note: The published program finds images that are "right when whole, wrong when masked" by adding two boolean tensors
and comparing with 2; on today's PyTorch that is always false and its size term vanishes. Here it is a logical and.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Names of the statistics returned by `summary`.
STATISTICS = ("mask_mean", "mask_std", "mask_entropy", "mask_tv")
#: The same statistics by the names and definitions of the published `score.py`.
PUBLISHED_STATISTICS = ("avg_mask", "std_mask", "entropy", "tv")


def decoder_loss(
    clean_logits: Tensor,
    masked_logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    lambda_r: float,
    adversarial: bool,
) -> Tensor:
    """Compute the loss of a batch of masks.

        E[ 1{f(x) right} · Σ_l p_l log p_l (x_out) ]      or, adversarial, −CE(f(x_out), y)
        − λ_r · mean( ReLU( 1{f(x) right and f(x_out) wrong} − mean(s) ) )

    Args:
        clean_logits: (N, L) of the current classifier on whole images; treated as constants.
        masked_logits: (N, L) of the judge on x·(1 − s).
        targets: (N,) int64.
        mask: (N, 1, H, W), s.
        lambda_r: Weight of the size term.
        adversarial: Use the adversarial first term.

    Returns:
        Scalar float32 (float64 for float64 input).
    """
    masked_logits = _at_least_float(masked_logits)
    correct = clean_logits.detach().argmax(1) == targets
    fooled = masked_logits.detach().argmax(1) != targets
    if adversarial:
        confusion = -F.cross_entropy(masked_logits, targets)
    else:
        confusion = (correct * negative_entropy(masked_logits)).mean()
    size = mask.flatten(1).mean(1)
    kept_small = F.relu((correct & fooled).to(size.dtype) - size).mean()
    return confusion - lambda_r * kept_small


def negative_entropy(logits: Tensor) -> Tensor:
    """Return Σ_l p_l log p_l of logits (N, L), in nats: (N,)."""
    log_p = _at_least_float(logits).log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


def mask_figures(mask: Tensor) -> Tensor:
    """Compute the logged statistics of masks, per image.

    Args:
        mask: (N, 1, H, W) in [0, 1].

    Returns:
        (N, 4) float64: the mean; its square (their averages give the spread of sizes over images); the mean binary
        entropy of a pixel in nats; the mean absolute difference of neighbours (half of it horizontal, half vertical).
    """
    s = mask.detach().double()
    mean = s.flatten(1).mean(1)
    entropy = -(torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s)).flatten(1).mean(1)
    return torch.stack([mean, mean**2, entropy, 0.5 * (_variation(s, 2) + _variation(s, 3))], dim=1)


def published_figures(mask: Tensor) -> Tensor:
    """Compute the statistics that the published `score.py` sums up, per image.

    Args:
        mask: (N, 1, H, W) in [0, 1].

    Returns:
        (N, 4) float64: the mean; its square; the mean of −s·log2 s; the mean squared difference of neighbours,
        horizontal and vertical added.
    """
    s = mask.detach().double()
    mean = s.flatten(1).mean(1)
    entropy = -torch.xlogy(s, s).flatten(1).mean(1) / math.log(2)
    variation = s.diff(dim=2).square().flatten(1).mean(1) + s.diff(dim=3).square().flatten(1).mean(1)
    return torch.stack([mean, mean**2, entropy, variation], dim=1)


def published_summary(sums: Tensor, count: float) -> dict[str, float]:
    """Return the published statistics from sums of `published_figures`, with the deviation of a sample (count − 1)."""
    statistics = summary(sums, count)
    mean, spread, entropy, variation = statistics.values()
    spread *= math.sqrt(count / (count - 1)) if count > 1 else 0.0
    return dict(zip(PUBLISHED_STATISTICS, (mean, spread, entropy, variation), strict=True))


def _variation(s: Tensor, dim: int) -> Tensor:
    """Return the mean |difference| of neighbours in one direction, (N,); 0 if there are none."""
    if s.shape[dim] < 2:
        return s.new_zeros(len(s))
    return s.diff(dim=dim).abs().flatten(1).mean(1)


def summary(sums: Tensor, count: float) -> dict[str, float]:
    """Compute mask statistics from sums of `mask_figures` over images.

    Args:
        sums: (4,).
        count: Number of images.

    Returns:
        Statistics by the names in `STATISTICS`; `mask_std` is the deviation of the images' means. NaN without images.
    """
    if not count:
        return dict.fromkeys(STATISTICS, float("nan"))
    mean, squared, entropy, variation = (sums / count).tolist()
    spread = max(squared - mean**2, 0.0) ** 0.5
    return dict(zip(STATISTICS, (mean, spread, entropy, variation), strict=True))


def _at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
