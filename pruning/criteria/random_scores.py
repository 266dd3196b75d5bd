"""Random scores, the baseline that every criterion has to beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pruning.criteria.criterion import GroupWeights, WeightCriterion, register_criterion


@register_criterion("random")
class Random(WeightCriterion):
    """Uniform in [0, 1); a function of only the seed, the group's name and its width, so all ranks agree.

    Args:
        seed: Seed; determines the order.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score_group(self, group: GroupWeights) -> Tensor:
        """Return scores, (width,)."""
        digest = hashlib.sha256(f"{self.seed}/{group.name}/{group.width}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return torch.rand(group.width, generator=generator, dtype=torch.float64)
