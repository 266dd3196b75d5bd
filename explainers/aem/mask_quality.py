"""Quality of masks: KL of the masked prediction, its agreement with the black box, and the masks' area.

Masks are taken as probabilities, without noise. Sums are exact over ranks: every image counts once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from explainers.aem.saved_selector import SelectorExplanation
from explainers.aem.selector import Selector
from explainers.aem.selector_losses import imitation_loss
from explainers.differentiable.explanation import EXPLAINED, ExplainedClass, explained_classes
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed
from image_classification.models import evaluating, main_and_auxiliary_logits
from image_classification.precision import Precision

#: Seed of the random masks, so that every evaluation draws the same ones.
_SEED = 20220

#: Maps images (N, 3, S, S) and their targets to the black box's logits (N, L) and masks (N, 1, S, S).
Masker = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Batches(Protocol):
    """The part of a loader's interface that a measurement uses."""

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None: ...


@torch.inference_mode()
def judge_masks(
    masker: Masker,
    predictor: nn.Module,
    loader: Batches,
    *,
    precision: Precision,
    distributed: Distributed,
    multi_label: bool = False,
    max_batches: int | None = None,
) -> dict[str, float]:
    """Measure masks on a split. Collective.

    Args:
        masker: Returns black-box logits and masks for a batch.
        predictor: Judges masked images; its mode is restored afterwards.
        loader: The split.
        precision: Autocast of the forward passes.
        distributed: Ranks to sum over.
        multi_label: See `imitation_loss`.
        max_batches: Largest number of batches on each rank, None for all.

    Returns:
        `kl` in nats, `agreement` (share of images where arg-max q(x·r) = arg-max f(x)) in percent, `area` (mean of
        the masks) in percent, `samples`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=distributed.device)
    loader.set_epoch(0)
    with evaluating(predictor):
        for batch in itertools.islice(loader, max_batches):
            if not len(batch):  # the last batch of an uneven split may be empty on this rank
                continue
            with precision.autocast():
                wanted, masks = masker(batch.images, batch.targets)
                logits, _ = main_and_auxiliary_logits(predictor(batch.images * masks))
            divergence = imitation_loss(wanted, logits, multi_label=multi_label)
            agree = wanted.argmax(1) == logits.argmax(1)
            parts = [divergence.sum(), agree.sum(), masks.mean((1, 2, 3)).sum()]
            sums[:3] += torch.stack([part.double() for part in parts])
            sums[3] += len(agree)
    (total,) = distributed.all_reduce_sum(sums)
    divergence_sum, agreed, area, count = total.tolist()
    if not count:
        return {"kl": math.nan, "agreement": math.nan, "area": math.nan, "samples": 0.0}
    return {
        "kl": divergence_sum / count,
        "agreement": 100 * agreed / count,
        "area": 100 * area / count,
        "samples": count,
    }


class SelectorMasks:
    """`Masker` that uses a selector and the classifier it explains.

    Args:
        selector: The selector.
        black_box: The classifier.
        explained: The class that gates the selector.
    """

    def __init__(
        self, selector: Selector, black_box: nn.Module, explained: ExplainedClass = EXPLAINED
    ) -> None:
        self.explanation = SelectorExplanation(selector)
        self.black_box = black_box
        self.explained = explained

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (N, L) and masks (N, 1, S, S)."""
        selector = self.explanation.selector
        labels = None
        if self.explained == "label" and targets is not None:
            labels = explained_classes(self.explained, targets, targets)
        with evaluating(selector):
            raw, logits = self.explanation.raw_and_logits(self.black_box, images, labels)
        return logits, selector.mask(raw, images.shape[-1])


class FixedRandomMasks:
    """`Masker` for judging a predictor: random masks, the same sequence for every instance.

    Args:
        draw: Draws the masks.
        black_box: f.
        rank: Rank of this process; ranks draw different masks.
    """

    def __init__(
        self, draw: Callable[[int, torch.device, torch.Generator], Tensor], black_box: nn.Module, rank: int
    ) -> None:
        self.draw = draw
        self.black_box = black_box
        self.rank = rank
        self._generator: torch.Generator | None = None

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (N, L) and masks (N, 1, S, S)."""
        if self._generator is None:
            self._generator = torch.Generator(images.device).manual_seed(_SEED + self.rank)
        logits, _ = main_and_auxiliary_logits(self.black_box(images))
        return logits, self.draw(len(images), images.device, self._generator)
