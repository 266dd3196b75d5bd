"""A small explanation for tests: a fixed nonlinear read-out of feature maps, with all features of a selector's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from explainers.differentiable.features import FeatureTaps


@dataclasses.dataclass(frozen=True)
class ReadOut:
    """φ_k = Σ_taps tanh(spatially weighted mean of the map) · w_k; depends on positions, as a centre does.

    Attributes:
        taps, widths: Modules, and channels of their outputs.
        size: K.
        kept: See `Explanation.rewritten`.
    """

    taps: tuple[str, ...]
    widths: tuple[int, ...]
    size: int = 3
    kept: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __call__(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        with FeatureTaps(
            model, self.taps, self.kept, dict(zip(self.taps, self.widths, strict=True))
        ) as caught:
            model(images)
            features = caught.features
        generator = torch.Generator().manual_seed(5)
        total = images.new_zeros(len(images), self.size)
        for feature in features:
            weights = torch.randn(self.size, feature.shape[1], generator=generator).to(feature)
            ramp = torch.linspace(0.5, 1.5, feature.shape[-1]).to(feature)
            total = total + torch.tanh((feature * ramp).mean((2, 3))) @ weights.T / feature.shape[1] ** 0.5
        return total * (1 + 0.1 * classes.to(total.dtype)[:, None])

    def rewritten(self, kept: Mapping[str, Tensor]) -> Self:
        return dataclasses.replace(self, kept=dict(kept))
