"""First-order Taylor criteria: the first-order change of the loss when a unit is removed.

With a gate m on a feature map a and g = ∂ℓ/∂a, the derivative of one image's loss by the gate is Σ g·a over positions
(and over the members of a coupled group, which share one gate).

    taylor        Molchanov et al., "Pruning convolutional neural networks for resource efficient inference" (ICLR
                  2017), eq. 7–8:                   score_c = mean over images of |Σ g_c·a_c|
    taylor-2019   Molchanov et al., "Importance estimation for neural network pruning" (CVPR 2019), eq. 8 with
                  gates (their eq. 10):             score_c = mean over batches of (mean over images of Σ g_c·a_c)²

Note: the 2017 paper divides by the number of positions and by the layer's L2 norm. The first is constant within a layer
and would make changes of the loss incomparable between layers, so it is left out; the second is `normalise_scores(…,
"l2")`. Both papers put the gate after the layer (or its batch norm); here it is where the next layers read, so that a
gate of 0 is exactly the removal.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pruning.criteria.criterion import Average, GradientCriterion, register_criterion


@register_criterion("taylor")
class Taylor(GradientCriterion):
    """Mean absolute first-order change of the loss."""

    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Reduce (K, N, U) to (U,), summed over images."""
        return gate_gradients.abs().sum((0, 1))


@register_criterion("taylor-2019")
class Taylor2019(GradientCriterion):
    """Squared first-order change of a batch's mean loss."""

    average: ClassVar[Average] = "batches"

    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Reduce (K, N, U) to (U,) of one batch."""
        return gate_gradients.mean(1).square().sum(0)
