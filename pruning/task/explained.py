"""The interface of an explanation that pruning should preserve. The object is passed in; nothing here computes one.

`explainers.differentiable.remembered.OriginalExplanations` is the implementation that the training job uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.plain_data import Plain

Autocast = Callable[[], AbstractContextManager[object]]
"""Creates the context of a forward pass, such as `Precision.autocast`."""

FeatureGate = Callable[[str, Tensor], Tensor]
"""Maps (name of a tap, its feature map) to the feature map with its channels gated."""


class Explained(Protocol):
    """An explanation φ of a network, with its values in the original network."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the modules whose output φ reads."""

    @property
    def remembered(self) -> bool:
        """Whether `remember` has been called."""

    def remember(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        distributed: Distributed | None = None,
        autocast: Autocast = nullcontext,
    ) -> None:
        """Store φ of the current network as that of the original. Collective."""

    def lookup(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes (N,) and original φ (N, K) of remembered images."""

    def keys(self, images: Tensor) -> list[int]:
        """Return a 64-bit key per image, the same in every batch, rank and run."""

    def gated(self, model: nn.Module, images: Tensor, classes: Tensor, gate: FeatureGate) -> Tensor:
        """Compute φ (N, K) of the current network, its feature maps read through `gate`."""

    def moved(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        distributed: Distributed | None = None,
        autocast: Autocast = nullcontext,
    ) -> float:
        """Return the mean squared distance of φ from the original network's. Collective."""

    def follow(self, staying: Mapping[str, tuple[int, Tensor]]) -> None:
        """Update φ after a rewrite: tap → (number of channels before, positions that stay)."""

    def state_dict(self) -> Plain:
        """Return plain data and tensors for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore a state from `state_dict`."""
