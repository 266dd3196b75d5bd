"""Objectives of predictor and selector training, for the common training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from explainers.aem.masks import MaskGeometry, random_rbf_masks, relaxed_bernoulli, to_size
from explainers.aem.selector import Selector
from explainers.aem.selector_losses import area_penalty, imitation_loss, total_variation
from explainers.differentiable.explanation import EXPLAINED, ExplainedClass, explained_classes
from explainers.differentiable.features import FeatureTaps
from image_classification.distributed import Distributed
from image_classification.models import main_and_auxiliary_logits, unwrap

#: Weight of the imitation loss of each auxiliary head, as in training on labels.
_AUXILIARY_WEIGHT = 0.3
_PARTS = ("kl", "area", "tv")


@dataclasses.dataclass(frozen=True)
class RandomMasks:
    """Random masks that a predictor is trained on.

    Attributes:
        kind: "rbf": random RBF masks; "real-x": each cell is kept or dropped with probability ½.
        geometry: Geometry of RBF masks; its `image_size` is the side of the images for both kinds.
        grid: Height and width in cells of "real-x" masks: the resolution of the selector's masks.
        temperature, hard: See `relaxed_bernoulli`.
    """

    kind: str
    geometry: MaskGeometry
    grid: tuple[int, int]
    temperature: float
    hard: bool

    def __call__(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Draw masks (count, 1, S, S) in [0, 1]."""
        if self.kind == "rbf":
            probabilities = random_rbf_masks(count, self.geometry, device, generator)
        else:
            probabilities = torch.full((count, 1, *self.grid), 0.5, device=device)
        noise = torch.rand(probabilities.shape, device=device, generator=generator)
        sample = relaxed_bernoulli(probabilities, self.temperature, hard=self.hard, uniform=noise)
        return to_size(sample, self.geometry.image_size)


class PredictorObjective:
    """KL( f(x) ‖ q(x·s) ) for random masks s; the model in training is q.

    Args:
        black_box: f, frozen.
        masks: Draws s.
        multi_label: See `imitation_loss`.
    """

    def __init__(
        self, black_box: nn.Module, masks: Callable[[int, torch.device], Tensor], *, multi_label: bool = False
    ) -> None:
        self.black_box = black_box
        self.masks = masks
        self.multi_label = multi_label

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.__call__`; labels are counted but not learned."""
        with torch.no_grad():
            wanted, _ = main_and_auxiliary_logits(self.black_box(images))
        masked = images * self.masks(len(images), images.device)
        logits, auxiliary = main_and_auxiliary_logits(model(masked))
        loss = imitation_loss(wanted, logits, multi_label=self.multi_label).mean()
        for extra in auxiliary:
            more = imitation_loss(wanted, extra, multi_label=self.multi_label).mean()
            loss = loss + _AUXILIARY_WEIGHT * more
        return loss, logits


@dataclasses.dataclass(frozen=True)
class SelectorWeights:
    """Constants of the selector's loss.

    Attributes:
        area: λ1.
        smoothness: λ2.
        exponent: α.
        temperature, hard: See `relaxed_bernoulli`.
    """

    area: float
    smoothness: float
    exponent: float
    temperature: float
    hard: bool


class SelectorObjective:
    """KL( f(x) ‖ q(x·s) ) + λ1·area + λ2·TV for masks s of the selector; the model in training is its decoder.

    Args:
        black_box: f, frozen, in evaluation mode; also the selector's encoder.
        predictor: q, frozen, in evaluation mode.
        weights: Constants.
        multi_label: See `imitation_loss`.
        explained: The class that gates the selector.
    """

    def __init__(
        self,
        black_box: nn.Module,
        predictor: nn.Module,
        weights: SelectorWeights,
        *,
        multi_label: bool = False,
        explained: ExplainedClass = EXPLAINED,
    ) -> None:
        self.black_box = black_box
        self.predictor = predictor
        self.weights = weights
        self.multi_label = multi_label
        self.explained = explained
        self._sums: Tensor | None = None

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.__call__`; labels are not learned. Returns q's logits on masked images."""
        selector = unwrap(model)
        assert isinstance(selector, Selector)
        with torch.no_grad(), FeatureTaps(self.black_box, selector.design.taps) as caught:
            wanted, _ = main_and_auxiliary_logits(self.black_box(images))
            features = caught.features
        raw = model(features, explained_classes(self.explained, wanted, targets))
        weights = self.weights
        masks = selector.sample(raw, weights.temperature, hard=weights.hard)
        logits, _ = main_and_auxiliary_logits(self.predictor(images * masks))
        divergence = imitation_loss(wanted, logits, multi_label=self.multi_label).mean()
        area = area_penalty(masks, weights.exponent)
        variation = total_variation(masks)
        self._add(torch.stack([divergence, area, variation]).detach(), len(images))
        return divergence + weights.area * area + weights.smoothness * variation, logits

    def _add(self, parts: Tensor, count: int) -> None:
        """Accumulate the parts of the loss on the device, without a host sync."""
        weighted = torch.cat([parts.double() * count, parts.new_full((1,), count, dtype=torch.float64)])
        self._sums = weighted if self._sums is None else self._sums + weighted

    def read_parts(self, distributed: Distributed) -> dict[str, float]:
        """Return means of the unweighted parts since the last call, over all ranks: `kl`, `area`, `tv`. Collective."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(_PARTS) + 1, dtype=torch.float64, device=distributed.device)
        (total,) = distributed.all_reduce_sum(sums)
        self._sums = None
        *parts, count = total.tolist()
        return {name: part / count for name, part in zip(_PARTS, parts, strict=True)} if count else {}
