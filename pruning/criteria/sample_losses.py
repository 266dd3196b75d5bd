"""Per-sample losses of classifiers, which criteria differentiate and searches compare."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pruning.task import SampleLoss


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of every sample, in float32.

    Args:
        logits: (N, L).
        targets: (N,) class indices or (N, L) probabilities.

    Returns:
        Losses (N,).
    """
    targets = targets if targets.dim() == 1 else targets.float()
    return F.cross_entropy(logits.float(), targets, reduction="none")


def multi_label_sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over classes of every sample: `targets` (N, L) multi-hot → (N,)."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return losses.mean(dim=1)


def losses_of(multi_label: bool) -> SampleLoss:
    """Return the per-sample loss of a job."""
    return multi_label_sample_losses if multi_label else sample_losses
