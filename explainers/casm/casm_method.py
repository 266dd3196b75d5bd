"""CASM among the attribution methods: one pass through a trained mapping instead of a calculation per image.

The mask depends neither on the class nor on the network being explained: the CASM's own classifier reads the image. For
the mask as a function of another network's features see `CasmExplanation`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from explainers.attribution.method import Attribution, check_request, dtype_of, frozen_copy, register_method
from explainers.casm.model import load_casm
from image_classification.config import check_setting, flag
from image_classification.models import exact_float32, main_and_auxiliary_logits


@register_method("casm")
@dataclasses.dataclass(frozen=True)
class CasmMethod:
    """A trained classifier-agnostic saliency mapping.

    Attributes:
        path: Its file.
    """

    name: ClassVar[str]
    path: str | None = flag(
        None,
        "--casm-path",
        setting="path",
        metavar="FILE",
        help="casm: the trained saliency mapping, a file of train-casm",
    )

    def __post_init__(self) -> None:
        check_setting(self.path is not None, "path", self.path, "casm needs the file of a trained mapping")

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedCasm:
        """See `Method.prepare`."""
        return PreparedCasm(model, example, str(self.path))


class PreparedCasm:
    """A mapping, and a copy of the network for the logits."""

    def __init__(self, model: nn.Module, example: Tensor, path: str) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)
        self.casm = load_casm(path, device=example.device)
        self(example[:1], torch.zeros(1, dtype=torch.int64, device=example.device))

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`; the map is the same for every target."""
        check_request(images, targets)
        with exact_float32():
            logits, _ = main_and_auxiliary_logits(self.model(images.to(self.dtype)))
            _, mask = self.casm(images.float())
        return Attribution.without_account(mask[:, 0], logits, targets)
