"""An explanation that is followed through rewrites: remembered before the first, measured around each."""

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

#: Output → number of channels before a cut, and positions of those that stay.
Staying = dict[str, tuple[int, Tensor]]


class Followed:
    """An explanation and the network whose rewrites it follows; with None for the explanation nothing happens.

    Args:
        originals: The explanation, with what it was in the original network.
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
        """Whether there is an explanation of whose original nothing is known yet."""
        return self.originals is not None and not self.originals.remembered

    def remember(self, batches: Sequence[Batch]) -> None:
        """Treat the present network as the original one, unless one is known."""
        if self.originals is not None and self.is_new:
            self.originals.remember(self._model, batches, self._distributed, self._autocast)

    def moved(self, batches: Sequence[Batch]) -> list[float]:
        """Mean squared distance from the original network's explanation; empty where none is followed."""
        if self.originals is None:
            return []
        return [self.originals.moved(self._model, batches, self._distributed, self._autocast)]

    def staying(self, graph: ChannelGraph, mask: np.ndarray) -> Staying:
        """What a cut leaves of the feature maps that the explanation reads, for `follow`; before the cut."""
        return staying_channels(graph, mask, () if self.originals is None else self.originals.taps)

    def follow(self, staying: Staying) -> None:
        """Follow a cut that has been made."""
        if self.originals is not None:
            self.originals.follow(staying)

    def state_dict(self) -> Plain | None:
        """What is known of the original, for a checkpoint; None where nothing is followed."""
        return None if self.originals is None else self.originals.state_dict()
