"""φ as a Grad-CAM map: the explanation that every network has without any training.

The map at the resolution of its layer, divided by its L2 norm, so that it says where the evidence lies and not how
large the logit is. It is differentiable through the network twice over: the map itself contains a derivative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from explainers.attribution.gradcam import class_activation, find_layer
from image_classification.models import evaluating

_TINY = 1e-6


class GradCamExplanation:
    """Grad-CAM maps as an `Explanation`.

    Args:
        layer: Name of the module whose output is weighted.

    Note: removing channels needs no record here: the map is a sum over channels, those that are gone add nothing.
    """

    size = None
    taps: tuple[str, ...] = ()

    def __init__(self, layer: str) -> None:
        self.layer = layer

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> GradCamExplanation:
        """For the last feature map that everything in `model` goes through; `example` (N, 3, H, W) finds it.

        Raises:
            UnsupportedOperatorError: There is none.
        """
        with evaluating(model):
            return cls(find_layer(model, example))

    def __call__(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """See `Explanation.__call__`; K is the number of the map's pixels, and maps without evidence are all zero."""
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            # Only maps of remembered images are differentiated, whose classes were looked at then.
            maps, _ = class_activation(model, self.layer, images, classes, create_graph=wanted, known=wanted)
        flat = maps.flatten(1)
        flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
        lengths: Tensor = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return flat / lengths.clamp_min(_TINY)

    def rewritten(self, kept: Mapping[str, Tensor]) -> Self:
        """See `Explanation.rewritten`."""
        return self
