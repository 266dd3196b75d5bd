"""Distance to the geometric median: filters near it can be replaced by the others of their layer.

He et al., "Filter pruning via geometric median for deep convolutional neural networks acceleration" (CVPR 2019), eq. 8:
score_c = Σ_k ‖w_c − w_k‖₂ over the filters of the layer, summed over coupled layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.criteria.criterion import GroupWeights, WeightCriterion, register_criterion

_BLOCK_COLUMNS = 4096  # only part of a large fully connected layer is widened to float64 at a time


def total_distances(filters: Tensor) -> Tensor:
    """Sum the Euclidean distances of every row of (C, D), real or complex, to all rows: (C,) float64."""
    filters = torch.view_as_real(filters).flatten(1) if filters.is_complex() else filters
    products = filters.new_zeros(len(filters), len(filters), dtype=torch.float64)
    for columns in filters.split(_BLOCK_COLUMNS, dim=1):
        wide = columns.double()
        products.addmm_(wide, wide.T)
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt().sum(1)


@register_criterion("fpgm")
class FPGM(WeightCriterion):
    """Distance to the other filters of the layer."""

    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Return scores, (width,); None if the group has no filters."""
        filters = [m for m in group.with_role("out") if m.values.dim() > 1]
        if not filters:
            return None
        return torch.stack([m.add_to_units(total_distances(m.slices()), group.width) for m in filters]).sum(0)
