"""A trained selector as an attribution method: its mask for the class, without noise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from explainers.aem.saved_selector import SelectorExplanation, load_selector
from explainers.attribution.method import Attribution, check_request, dtype_of, frozen_copy, register_method
from image_classification.config import check_setting, flag
from image_classification.models import identity_of


@register_method("selector")
@dataclasses.dataclass(frozen=True)
class SelectorMethod:
    """The mask of an amortised explanation model.

    Attributes:
        selector: File of `train-selector`, trained for the network being explained.
    """

    name: ClassVar[str]
    selector: str | None = flag(
        None, "--selector", metavar="FILE", help="selector: what train-selector wrote for the network"
    )

    def __post_init__(self) -> None:
        check_setting(
            self.selector is not None,
            "selector",
            self.selector,
            "the method needs the file that `python -m explainers train-selector` wrote",
        )

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedSelector:
        """See `Method.prepare`.

        Raises:
            ConfigError: The selector belongs to another network, image size or number of classes.
        """
        explanation = load_selector(str(self.selector), device=example.device)
        identity = identity_of(model)
        num_classes = explanation.design.num_classes if identity is None else identity.num_classes
        explanation.check_network(model, image_size=example.shape[-1], num_classes=num_classes)
        return PreparedSelector(model, explanation)


class PreparedSelector:
    """A selector bound to a copy of its network."""

    def __init__(self, model: nn.Module, explanation: SelectorExplanation) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)
        self.explanation = explanation

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        check_request(images, targets)
        with torch.autocast(images.device.type, enabled=False):
            raw, logits = self.explanation.raw_and_logits(self.model, images.to(self.dtype), targets)
        masks = self.explanation.selector.mask(raw, images.shape[-1])[:, 0].float()
        return Attribution.without_account(masks, logits, targets)
