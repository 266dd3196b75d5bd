"""Peak activation memory of inference.

    memory = max over moments  Σ_{storages alive}  bytes            (per image)

A moment is the execution of one operator: what was alive before it, plus what it allocates. Storages are followed
through one eager forward pass in evaluation mode, so a tensor counts until Python releases it (a local variable, the
shortcut of a block). Views and in-place operators allocate nothing; index outputs of poolings count. The input images
count; parameters, kernel workspaces and the allocator's rounding do not. Attention counts as plain operators (its
weights are written out). Bytes are those of the network's own dtype, without autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.costs.activations import Activations
from pruning.costs.counts import CountTable, OnDevices
from pruning.costs.product_costs import Products


class PeakMemory:
    """Peak of the bytes alive at the same time, a maximum of sums of products of counts."""

    def __init__(self, activations: Activations, table: CountTable) -> None:
        terms = [(extent.factor, table.rows(extent.vectors)) for extent in activations.allocations]
        self._sizes = Products(terms, merge=False)
        moments = torch.from_numpy(activations.moments).to(torch.float64)
        self._constants = OnDevices(moments=moments.T.contiguous())

    def evaluate(self, counts: Tensor) -> Tensor:
        """See `Metric`. The gradient is that of the moments at the peak."""
        return (self._sizes.values(counts) @ self._constants.at(counts.device)["moments"]).amax(-1)

    def part(self, rows: Tensor) -> None:
        """See `Metric`: always None, since a maximum has no summands."""
