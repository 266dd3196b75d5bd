"""What the library asks of an explanation that pruning is to keep. The object is handed in; nothing here computes one.

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
"""Makes the context of a forward pass, such as `Precision.autocast`."""

FeatureGate = Callable[[str, Tensor], Tensor]
"""(name of a tap, its feature map) → the map with its channels' gates."""


class Explained(Protocol):
    """An explanation φ of a network, with what it was in the original network."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Modules whose output φ reads."""

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
        """Treat the present network as the original one. Collective."""

    def lookup(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (N,) and original φ (N, K) of images that were remembered."""

    def keys(self, images: Tensor) -> list[int]:
        """A 64-bit number per image, the same in every batch, rank and run."""

    def gated(self, model: nn.Module, images: Tensor, classes: Tensor, gate: FeatureGate) -> Tensor:
        """φ (N, K) of the network as it is, its feature maps read through `gate`."""

    def moved(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        distributed: Distributed | None = None,
        autocast: Autocast = nullcontext,
    ) -> float:
        """Mean squared distance of φ from the original network's. Collective."""

    def follow(self, staying: Mapping[str, tuple[int, Tensor]]) -> None:
        """Follow a rewrite: tap → number of channels before, positions that stay."""

    def state_dict(self) -> Plain:
        """Plain data and tensors for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore a state from `state_dict`."""
