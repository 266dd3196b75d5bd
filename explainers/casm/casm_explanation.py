"""A CASM mask as an explanation φ, a function of the network's features, for matching and for pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from explainers.casm.decoder import CasmDecoder
from explainers.casm.model import Casm
from explainers.differentiable.features import FeatureTaps


class CasmExplanation:
    """The mask of a trained decoder, given a network's features; see `explanation.Explanation`.

    The decoder is copied, frozen and in evaluation mode; the network is passed with each call. A mask covers all
    classes at once, so the requested classes make no difference.

    Args:
        casm: The mapping; only its decoder is used, not its classifier.
    """

    def __init__(self, casm: Casm) -> None:
        self._decoder: CasmDecoder = copy.deepcopy(casm.decoder).requires_grad_(False).eval()
        self._taps = casm.taps
        self._widths = casm.widths
        self._kept = dict(casm.kept)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the modules that the decoder reads, the base first."""
        return self._taps

    @property
    def size(self) -> int | None:
        """None: one value per element of the mask, whose size follows that of the images."""
        return None

    def __call__(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """Compute φ of a batch: the mask at the decoder's resolution, flattened.

        Args:
            model: The network; autograd flows through its activations.
            images: (N, 3, H, W), normalised.
            classes: (N,), not used.

        Returns:
            (N, h·w) float32 in (0, 1).
        """
        return self.mask(model, images).flatten(1)

    def mask(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the part to remove, (N, 1, h, w) float32 in (0, 1), at the decoder's resolution."""
        self._follow(images)
        with FeatureTaps(model, self._taps, self._kept, self._widths) as taps:
            model(images)
            features = taps.features
        mask: Tensor = self._decoder(features).float()
        return mask

    def rewritten(self, kept: Mapping[str, Tensor]) -> Self:
        """See `Explanation.rewritten`."""
        unknown = sorted(set(kept) - set(self._taps))
        if unknown:
            raise ValueError(
                f"kept names {unknown[0]!r}, which the decoder does not read ({', '.join(self._taps)})"
            )
        other = copy.copy(self)
        other._kept = dict(kept)
        return other

    def _follow(self, images: Tensor) -> None:
        """Move the decoder to the device of the images."""
        if next(self._decoder.parameters()).device != images.device:
            self._decoder.to(images.device)
