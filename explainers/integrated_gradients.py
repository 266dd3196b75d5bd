"""Integrated gradients (Sundararajan et al. 2017): (x − x₀) ⊙ ∫₀¹ ∂z_k/∂x (x₀ + α(x − x₀)) dα, summed over colours.

The integral is taken by Gauss-Legendre quadrature. Its sum approaches z_k(x) − z_k(x₀) as the number of steps grows
(completeness); `started` is that difference.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from explainers.base import (
    Attribution,
    check_request,
    dtype_of,
    exact_products,
    frozen_copy,
    register_method,
    target_logits,
)
from image_classification.models import main_and_auxiliary_logits


@register_method("ig")
@dataclasses.dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients.

    Attributes:
        steps: Points of the quadrature; each costs a forward and a backward pass.
        baseline: Value of the normalised pixels of x₀; 0 is the data set's mean colour.
    """

    name: ClassVar[str]
    steps: int = 32
    baseline: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give at least 1")

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedIntegratedGradients:
        """See `Method.prepare`."""
        return PreparedIntegratedGradients(model, example, self)


class PreparedIntegratedGradients:
    """Integrated gradients bound to a copy of a network."""

    def __init__(self, model: nn.Module, example: Tensor, method: IntegratedGradients) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)
        self.method = method
        nodes, weights = np.polynomial.legendre.leggauss(method.steps)
        self._points = [((node + 1) / 2, weight / 2) for node, weight in zip(nodes, weights, strict=True)]
        self._gradient(example[:1].to(self.dtype), torch.zeros(1, dtype=torch.int64, device=example.device))

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        check_request(images, targets)
        images = images.detach().to(self.dtype)
        baseline = torch.full_like(images, self.method.baseline)
        with torch.no_grad(), exact_products(images.device):
            logits, _ = main_and_auxiliary_logits(self.model(images))
            from_baseline, _ = main_and_auxiliary_logits(self.model(baseline[:1]))  # the same for all
        integral = torch.zeros_like(images)
        for position, weight in self._points:
            integral += weight * self._gradient(torch.lerp(baseline, images, position), targets)
        relevance = (images - baseline) * integral
        started = target_logits(logits, targets) - target_logits(from_baseline.expand_as(logits), targets)
        arrived = relevance.flatten(1).sum(1, dtype=torch.float64).float()
        return Attribution(relevance.sum(1).float(), True, started.float(), arrived, logits)

    def _gradient(self, images: Tensor, targets: Tensor) -> Tensor:
        """∂z_k/∂x at some pictures."""
        images = images.detach().requires_grad_()
        with torch.enable_grad(), exact_products(images.device):
            logits, _ = main_and_auxiliary_logits(self.model(images))
            (gradient,) = torch.autograd.grad(target_logits(logits, targets).sum(), images)
        return gradient
