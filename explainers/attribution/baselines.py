"""Centre baseline: the same map for every image, a floor for every method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from explainers.attribution.method import Attribution, check_request, dtype_of, frozen_copy, register_method
from image_classification.models import main_and_auxiliary_logits


@register_method("centre")
@dataclasses.dataclass(frozen=True)
class Centre:
    """1 in the middle of the image, falling with the distance to 0 in the corners."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedCentre:
        """See `Method.prepare`."""
        return PreparedCentre(model)


class PreparedCentre:
    """The centre baseline; the network is only run for its logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        check_request(images, targets)
        logits, _ = main_and_auxiliary_logits(self.model(images.to(self.dtype)))
        batch, _, height, width = images.shape
        rows = torch.linspace(-1, 1, height, device=images.device) if height > 1 else images.new_zeros(1)
        columns = torch.linspace(-1, 1, width, device=images.device) if width > 1 else images.new_zeros(1)
        distance = torch.hypot(rows[:, None], columns[None, :])
        heatmap = (1 - distance / distance.max().clamp(min=1)).float().expand(batch, -1, -1)
        return Attribution.without_account(heatmap, logits, targets)
