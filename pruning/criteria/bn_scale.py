"""Batch-norm scales: Liu et al., "Learning efficient ConvNets through network slimming" (ICCV 2017).

score_c = |γ_c|, summed over the batch norms of a coupled group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning.criteria.criterion import GroupWeights, WeightCriterion, register_criterion

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@register_criterion("bn-scale")
class BNScale(WeightCriterion):
    """|γ| of the normalisation layers that a unit passes through."""

    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Return scores, (width,); None if units pass through no normalisation with a scale."""
        scales = [m for m in group.members if isinstance(m.module, _NORMS) and m.name.endswith(".weight")]
        if not scales:
            return None
        seen = torch.cat([m.positions for m in scales]).unique()
        if (seen >= 0).sum() < group.width:
            return None
        return torch.stack([m.add_to_units(m.slices().abs().sum(1), group.width) for m in scales]).sum(0)
