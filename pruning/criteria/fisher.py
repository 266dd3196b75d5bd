"""Fisher information of channel gates: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning"
(2018), eq. 9 for feature maps.

    score_c = ½ · mean over images of (∂ℓ/∂m_c)²,      ∂ℓ/∂m_c = Σ g·a over positions and coupled members

It estimates how far the loss rises when unit c is removed, if the network is near a minimum.
"""

from __future__ import annotations

from torch import Tensor

from pruning.criteria.criterion import GradientCriterion, register_criterion


@register_criterion("fisher")
class Fisher(GradientCriterion):
    """½ E[(∂ℓ/∂m_c)²] with per-image derivatives."""

    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Reduce (K, N, U) to (U,), summed over images."""
        return gate_gradients.square().sum((0, 1)) / 2
