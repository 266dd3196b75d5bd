"""What the forward passes of several candidate cuts have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models.running import Outputs
from pruning.engine.examples import tensors_in
from pruning.engine.gates import Gates
from pruning.engine.named_tensors import named_tensors
from pruning.repair.local_repair import LocalRepair
from pruning.search.shared_beginning import Remembered, SharedBeginning
from pruning.task import Batch

_MOST_REMEMBERED = 1 << 30
"""Largest total size of what beginnings remember, in bytes."""


class SharedPasses:
    """Passes over batches, for candidates that all remove some channels and then each its own.

    Args:
        model: The network.
        gates: Its gates, which close a candidate's channels.
        batches: The batches.
        masks: The candidates, (num_units,) bool each: units to keep.
        repair: Repair that is applied to the candidates.
        enabled: Whether beginnings are shared.

    Attributes:
        order: Numbers of the candidates in the order in which to run them: those that differ first come first.
        enabled: Whether beginnings are shared.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Gates,
        batches: Sequence[Batch],
        masks: Sequence[np.ndarray],
        repair: LocalRepair | None,
        *,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled and len(masks) > 1
        remembered = Remembered(_MOST_REMEMBERED)
        self._beginnings = [SharedBeginning(remembered) for _ in batches]
        self._repair = repair
        # Groups, and so units, are numbered in the order in which the network meets them.
        stays = np.logical_or.reduce(masks) if masks else np.zeros(0, dtype=bool)
        firsts = [int(np.argmax(stays & ~mask)) for mask in masks]
        self.order = sorted(range(len(masks)), key=firsts.__getitem__)
        self._addresses = {name: _address(tensor) for name, tensor in named_tensors(model).items()}
        self._others: set[int] = set()
        self._closings: dict[str, tuple[bytes, ...]] = {}
        if self.enabled:
            known = (*gates.factors(stays), *tensors_in(list(batches)))
            self._others = {_address(tensor) for tensor in known}
            self._closings = {} if repair is None else repair.closings(stays)

    def run(self, batch: int, forward: Callable[[], Outputs], common: Collection[int]) -> Outputs:
        """Run a candidate's pass.

        Args:
            batch: Number of the batch.
            forward: Runs the network on it, with the candidate's gates set and its repair applied.
            common: From `common`.
        """
        return self._beginnings[batch].run(forward, common) if self.enabled else forward()

    def common(self, mask: np.ndarray) -> Collection[int]:
        """Return the addresses of all tensors that do not depend on what only this candidate removes."""
        if not self.enabled:
            return ()
        closings = {} if self._repair is None else self._repair.closings(mask)
        changed = {name for name, closed in closings.items() if closed != self._closings.get(name)}
        unchanged = {address for name, address in self._addresses.items() if name not in changed}
        return (unchanged | self._others) - {self._addresses[name] for name in changed} - {0}


def _address(tensor: Tensor) -> int:
    """Address of a tensor's storage; 0 if it has none of its own."""
    own = tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter)
    return tensor.untyped_storage().data_ptr() if own else 0
