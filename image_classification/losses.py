"""Task losses: cross-entropy for one class per image, per-class logistic loss for several.

Both accept soft targets, so mixup, CutMix and label smoothing combine.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.config import check, flag


@dataclasses.dataclass(kw_only=True)
class LossConfig:
    """Loss"""

    label_smoothing: float = flag(
        0.0, "--label-smoothing", help="Share of the target spread over all classes."
    )
    multi_label: bool = flag(
        False, "--multi-label", help="Several classes an image: logistic loss, mAP and F1."
    )

    def __post_init__(self) -> None:
        check(0 <= self.label_smoothing < 1, f"--label-smoothing: {self.label_smoothing} is outside [0, 1)")


class MultiLabelLoss(nn.Module):
    """Mean over images and classes of the binary cross-entropy with logits (multi-label soft-margin loss).

    Label smoothing moves each target `y` to `y·(1 − ε) + ε/2`, the two-class form of the usual rule.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of `logits` (N, L) and `targets` (N, L) in [0, 1]: a scalar."""
        smoothed = targets * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        return F.binary_cross_entropy_with_logits(logits, smoothed)


class SingleLabelLoss(nn.Module):
    """Cross-entropy with label smoothing; targets are class indices (N,) or probabilities (N, L)."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of `logits` (N, L): a scalar, the mean over images, in float32."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


def build_loss(config: LossConfig) -> nn.Module:
    """Build the task loss of this configuration: a module `(logits, targets) -> scalar`."""
    if config.multi_label:
        return MultiLabelLoss(config.label_smoothing)
    return SingleLabelLoss(config.label_smoothing)
