"""What CASM's decoder minimises, and what is logged about its masks (Żołna et al. 2020, equations 3 to 7).

Note: The published program finds pictures that are "right when whole, wrong when masked" by adding two boolean tensors
and comparing with 2; on today's PyTorch that is always false and its size term vanishes. Here it is a logical and.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Names of `mask_figures`, in the order of its columns.
MASK_FIGURES = ("mean", "squared_mean", "entropy", "total_variation")


def decoder_loss(
    clean_logits: Tensor, masked_logits: Tensor, targets: Tensor, mask: Tensor, *, lambda_r: float, adversarial: bool
) -> Tensor:  # fmt: skip
    """The loss of a batch of masks.

        E[ 1{f(x) right} · Σ_l p_l log p_l (x_out) ]      or, adversarial, −CE(f(x_out), y)
        − λ_r · mean( ReLU( 1{f(x) right and f(x_out) wrong} − mean(s) ) )

    Args:
        clean_logits: (N, L), of the present classifier on whole pictures; taken as constants.
        masked_logits: (N, L), of the judge on x·(1 − s).
        targets: (N,) int64.
        mask: (N, 1, H, W), s.
        lambda_r: Weight of the size term.
        adversarial: Which first term.

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
    """(N,) Σ_l p_l log p_l of logits (N, L), in nats."""
    log_p = _at_least_float(logits).log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


def mask_figures(mask: Tensor) -> Tensor:
    """What is logged about masks, picture by picture.

    Args:
        mask: (N, 1, H, W) in [0, 1].

    Returns:
        (N, 4) float64: the mean; its square (their averages give the spread of sizes over pictures); the mean binary
        entropy of a pixel in nats; the mean absolute difference of neighbours (half of it horizontal, half vertical).
    """
    s = mask.detach().double()
    mean = s.flatten(1).mean(1)
    entropy = -(torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s)).flatten(1).mean(1)
    return torch.stack([mean, mean**2, entropy, 0.5 * (_variation(s, 2) + _variation(s, 3))], dim=1)


def _variation(s: Tensor, dim: int) -> Tensor:
    """(N,) mean |difference| of neighbours in one direction; 0 where there are none."""
    if s.shape[dim] < 2:
        return s.new_zeros(len(s))
    return s.diff(dim=dim).abs().flatten(1).mean(1)


def summary(sums: Tensor, count: float) -> dict[str, float]:
    """Mask statistics from sums of `mask_figures` over pictures.

    Args:
        sums: (4,).
        count: Number of pictures.

    Returns:
        `mask_mean`, `mask_std` (of the pictures' means), `mask_entropy`, `mask_tv`; NaN without pictures.
    """
    if not count:
        return dict.fromkeys(("mask_mean", "mask_std", "mask_entropy", "mask_tv"), float("nan"))
    mean, squared, entropy, variation = (sums / count).tolist()
    spread = max(squared - mean**2, 0.0) ** 0.5
    return {"mask_mean": mean, "mask_std": spread, "mask_entropy": entropy, "mask_tv": variation}


def _at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
