"""φ as a Grad-CAM map, an explanation that needs no training.

The map is taken at the resolution of its layer and divided by its L2 norm, so that it shows where the evidence lies and
not how large the logit is. It contains a derivative itself, so differentiating it is second order.
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

    Note: removed channels need no bookkeeping: the map is a sum over channels, and removed ones add nothing.
    """

    size = None
    taps: tuple[str, ...] = ()

    def __init__(self, layer: str) -> None:
        self.layer = layer

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> GradCamExplanation:
        """Build the explanation for the last feature map of `model` that every path goes through.

        The map is found by running `example` (N, 3, H, W).

        Raises:
            UnsupportedOperatorError: The network has no such feature map.
        """
        with evaluating(model):
            return cls(find_layer(model, example))

    def __call__(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """See `Explanation.__call__`; K is the number of the map's pixels, and maps without evidence are zero."""
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            # Only maps of remembered images are differentiated; their classes were checked when they were remembered.
            maps, _ = class_activation(model, self.layer, images, classes, create_graph=wanted, known=wanted)
        flat = maps.flatten(1)
        flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
        lengths: Tensor = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return flat / lengths.clamp_min(_TINY)

    def rewritten(self, kept: Mapping[str, Tensor]) -> Self:
        """See `Explanation.rewritten`."""
        return self
