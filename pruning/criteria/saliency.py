"""Saliency: how far the network's explanation moves when a unit is removed.

φ(x; m) is the vector that explains the network's decision on image x (the centre and width of a selector's mask, a
Grad-CAM map, …) with gates m on the units, φ° that of the original network. Saliency-matching pruning (Ganjdanesh et
al., ECCV 2022) demands that ‖φ(x; m) − φ°(x)‖² stay small. With r = φ(x; 1) − φ° and J_c = ∂φ/∂m_c at m = 1, the
Gauss–Newton model of its change when unit c alone is removed is

    E‖r − J_c‖² − E‖r‖²  =  E‖J_c‖² − 2·E[r·J_c]  =  score_c

Before the first rewrite r = 0, so the loss has no gradient and the score is the curvature E‖J_c‖². Afterwards the
network has moved, and the second term favours removing units whose removal brings the explanation back; such units may
score below zero. `target="present"` omits this term and measures how far φ moves from its current value.

φ with K values takes K backward passes, which score all units of all layers at once and exactly. Where K is more than
`max_passes` (maps, masks), ‖J_c‖² = E_v (v·J_c)² with P random vectors v of ±1 (Hutchinson 1990): unbiased, with a
standard deviation of at most √(2/P) of an image's value, so √(2/(P·N)) of a mean over N similar images: 4 % for P = 4
and 320 images. r·J_c then takes one more pass and is exact. The signs are a function of the image, so ranks, batches
and resumed runs draw alike.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.config import check_choice, check_setting
from pruning.criteria.criterion import GradientCriterion, register_criterion
from pruning.task import Batch, Task, inputs_of
from pruning.task.explained import Explained, FeatureGate

Target = Literal["original", "present"]
TARGETS: tuple[Target, ...] = get_args(Target)
DEFAULT_PASSES = 4
DEFAULT_TARGET: Target = "original"


@register_criterion("saliency")
class Saliency(GradientCriterion):
    """Gauss–Newton change of the saliency-matching loss.

    Args:
        originals: φ with its values in the original network; call `remember` before the first scoring (a `Pruner` given
            this object does so).
        max_passes: Largest number of backward passes per batch (random probes take one more, for r·φ).
        target: One of `TARGETS`.

    Raises:
        ValueError: `max_passes` is less than 1, or the target is unknown.
    """

    # A decoder's activations add to the network's; half a batch at a time needs less memory than a training step.
    pieces: ClassVar[int] = 2

    def __init__(
        self, originals: Explained, max_passes: int = DEFAULT_PASSES, target: Target = DEFAULT_TARGET
    ) -> None:
        super().__init__()
        check_setting(max_passes >= 1, "max_passes", max_passes, "at least 1 backward pass is needed")
        check_choice("target", target, TARGETS)
        self.originals = originals
        self.max_passes = max_passes
        self.target = target
        self._residual: Tensor | None = None
        self._num_probes: int | None = None

    def watched(self) -> tuple[str, ...]:
        """Names of the modules whose feature maps the explanation reads."""
        return self.originals.taps

    def gated_objectives(
        self, model: nn.Module, batch: Batch, task: Task, gate: FeatureGate
    ) -> tuple[Tensor, ...]:
        """Return sums over the images of φ's values, or of random projections of them; then of r·φ if it is needed."""
        images = inputs_of(batch)
        classes, original = self.originals.lookup(images)
        phi = self.originals.gated(model, images, classes, gate).float()
        self._residual = (phi.detach() - original) if self.target == "original" else None
        if phi.shape[1] <= self.max_passes:
            self._num_probes = None
            return tuple(phi.sum(0).unbind())
        self._num_probes = self.max_passes
        signs = random_signs(self.originals.keys(images), self.max_passes, phi.shape[1]).to(phi.device)
        objectives = (signs * phi).sum((1, 2)).unbind()
        return objectives if self._residual is None else (*objectives, (self._residual * phi).sum())

    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Reduce (K, N, U) to (U,), summed over images."""
        curvatures = gate_gradients[: self._num_probes].square().sum((0, 1)) / (self._num_probes or 1)
        if self._residual is None:
            return curvatures
        if self._num_probes is None:
            pull = torch.einsum("knu,nk->u", gate_gradients, self._residual.to(gate_gradients.dtype))
        else:
            pull = gate_gradients[-1].sum(0)
        return curvatures - 2 * pull


def random_signs(keys: list[int], num_probes: int, size: int) -> Tensor:
    """Draw (P, N, K) float32 values of ±1, seeded for each image by its own key."""
    drawn = []
    for key in keys:
        generator = np.random.Generator(np.random.Philox(key=key % 2**64))
        drawn.append(torch.from_numpy(generator.integers(0, 2, (num_probes, size), dtype=np.int8)))
    return torch.stack(drawn, 1).float() * 2 - 1
