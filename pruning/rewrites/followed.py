"""An explanation followed through rewrites: recorded before the first, measured before and after each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.plain_data import Plain
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.tap_channels import staying_channels
from pruning.task import Batch
from pruning.task.explained import Autocast, Explained

#: Output → (number of channels before a cut, positions of those that stay).
Staying = dict[str, tuple[int, Tensor]]


class Followed:
    """An explanation and the network whose rewrites it follows; a no-op if the explanation is None.

    Args:
        originals: The explanation, with its values in the original network.
        model: The network.
        distributed: The ranks; `remember` and `moved` are collective.
        autocast: Context factory of the forward passes.
    """

    def __init__(
        self, originals: Explained | None, model: nn.Module, distributed: Distributed, autocast: Autocast
    ) -> None:
        self.originals = originals
        self._model = model
        self._distributed = distributed
        self._autocast = autocast

    @property
    def is_new(self) -> bool:
        """Whether there is an explanation without values of the original network yet."""
        return self.originals is not None and not self.originals.remembered

    def remember(self, batches: Sequence[Batch]) -> None:
        """Treat the current network as the original, unless one is already recorded."""
        if self.originals is not None and self.is_new:
            self.originals.remember(self._model, batches, self._distributed, self._autocast)

    def moved(self, batches: Sequence[Batch]) -> list[float]:
        """Return the mean squared distance from the original network's explanation; empty if none is followed."""
        if self.originals is None:
            return []
        return [self.originals.moved(self._model, batches, self._distributed, self._autocast)]

    def staying(self, graph: ChannelGraph, mask: np.ndarray) -> Staying:
        """Return, before a cut, what it leaves of the feature maps that the explanation reads; for `follow`."""
        return staying_channels(graph, mask, () if self.originals is None else self.originals.taps)

    def follow(self, staying: Staying) -> None:
        """Update the explanation after a cut."""
        if self.originals is not None:
            self.originals.follow(staying)

    def state_dict(self) -> Plain | None:
        """Return the original's values, for a checkpoint; None if nothing is followed."""
        return None if self.originals is None else self.originals.state_dict()
