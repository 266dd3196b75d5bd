"""CASM among the attribution methods: one pass through a trained mapping instead of a calculation per picture.

The mask belongs to no class and no network: the CASM's own classifier reads the picture, whichever network is asked
about. For the mask as a function of another network's features see `CasmExplanation`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

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
from explainers.casm.model import load_casm
from image_classification.models import main_and_auxiliary_logits


@register_method("casm")
@dataclasses.dataclass(frozen=True)
class CasmMethod:
    """A trained classifier-agnostic saliency mapping.

    Attributes:
        path: Its file.
    """

    name: ClassVar[str]
    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("--method casm needs a trained mapping: give its file with --casm-path")

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedCasm:
        """See `Method.prepare`."""
        return PreparedCasm(model, example, self.path)


class PreparedCasm:
    """A mapping beside a copy of the network, which is only asked for its logits."""

    def __init__(self, model: nn.Module, example: Tensor, path: str) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)
        self.casm = load_casm(path, device=example.device)
        self(example[:1], torch.zeros(1, dtype=torch.int64, device=example.device))

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`; the map is the same for every target."""
        check_request(images, targets)
        with exact_products(images.device):
            logits, _ = main_and_auxiliary_logits(self.model(images.to(self.dtype)))
            _, mask = self.casm(images.float())
        chosen = target_logits(logits, targets).float()
        return Attribution(mask[:, 0], False, chosen, torch.full_like(chosen, torch.nan), logits)
