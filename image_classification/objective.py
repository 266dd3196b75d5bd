"""Objective of a training step: maps a (micro-)batch to a loss. Distillation and similar methods replace this part."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from image_classification.models import main_and_auxiliary_logits


class Objective(Protocol):
    """Computes the loss of one micro-batch; called inside autocast."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Run `model` on `images` (N, 3, H, W) and return the scalar loss and the logits (N, L)."""
        ...


class TaskObjective:
    """The task loss; auxiliary heads (GoogLeNet, Inception v3) add their losses with the published weight.

    Args:
        criterion: `(logits, targets) -> scalar`.
        auxiliary_weight: Weight of each auxiliary head: 0.3 in GoogLeNet (Szegedy et al. 2015, section 5);
            Inception v3 is commonly trained with 0.4, close enough to share one flagless constant.
    """

    def __init__(self, criterion: nn.Module, auxiliary_weight: float = 0.3) -> None:
        self.criterion = criterion
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, auxiliary = main_and_auxiliary_logits(model(images))
        loss = self.criterion(logits, targets)
        for extra in auxiliary:
            loss = loss + self.auxiliary_weight * self.criterion(extra, targets)
        return loss, logits
