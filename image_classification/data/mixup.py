"""Mixup and CutMix on the batch.

Zhang et al., mixup: Beyond Empirical Risk Minimization (ICLR 2018); Yun et al., CutMix (ICCV 2019), equations 1–3.

Neighbours in the shuffled batch (0 and 1, 2 and 3, …) are partners; each pair has its own λ ~ Beta(α, α), drawn from
(seed, epoch, id of its first sample). With an even batch size the result is thus the same for any number of ranks and
accumulation steps and after every resume. An odd last image is not mixed.

Note: The papers draw one λ for the whole batch and partners from a permutation of it. The marginal distribution of a
mixed sample is the same.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from image_classification.config import check_setting
from image_classification.data.philox import Stream, uniforms
from image_classification.data.plan import BatchPlan
from image_classification.data.sending import sent

_TABLE_SIZE = 8192


def beta_quantile(alpha: float, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return quantiles of Beta(α, α) at (N,) probabilities in [0, 1), by integrating the density up to 1/2.

    The integral runs over s = x^p with p = min(α, 1): the density there, x^(α − p) (1 − x)^(α − 1), is bounded even for
    α < 1, where the original has a pole.
    """
    power = min(alpha, 1.0)
    s = np.linspace(0.0, 0.5**power, _TABLE_SIZE)
    x = s ** (1.0 / power)
    density = x ** (alpha - power) * (1.0 - x) ** (alpha - 1.0)
    integral = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    lower = np.minimum(numbers, 1.0 - numbers)  # the distribution is symmetric about 1/2
    values = np.interp(2.0 * lower, integral / integral[-1], s) ** (1.0 / power)
    return np.where(numbers < 0.5, values, 1.0 - values)


class Mixup:
    """Mixes the images and targets of a batch in pairs.

    Args:
        mixup, cutmix: α of each, 0 for off; if both are on, every pair takes one of them by a coin toss.
        num_classes: Length of the soft target that a class index becomes.
        seed: Seed of λ, boxes and coin.

    Raises:
        SettingError: An α is negative, or both are 0.
    """

    num_uniforms = 4

    def __init__(self, mixup: float, cutmix: float, *, num_classes: int, seed: int) -> None:
        check_setting(cutmix >= 0, "cutmix", cutmix, "give 0 for off, or more")
        enough = mixup >= 0 and mixup + cutmix > 0
        check_setting(enough, "mixup", mixup, "give 0 or more, and more than 0 where CutMix is off")
        self.mixup = mixup
        self.cutmix = cutmix
        self.num_classes = num_classes
        self.seed = seed

    def weights(self, plan: BatchPlan) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the mixing weights and boxes of a plan's pairs.

        Returns:
            (N,) weight of the image itself, and (N, 4) top, left, bottom, right of the box taken from the partner, in
                whole output pixels (empty if the pair is blended).
        """
        num_pairs = len(plan) // 2
        weights = np.ones(len(plan))
        boxes = np.zeros((len(plan), 4), dtype=np.int64)
        if num_pairs == 0:
            return weights, boxes
        # Four uniform numbers per pair: the coin, λ, and the centre of the box (vertical, horizontal).
        numbers = uniforms(self.seed, Stream.MIXUP, plan.epoch, plan.sample_ids[0 : 2 * num_pairs : 2], 4)
        cuts = numbers[:, 0] < self._share_of_cutmix()
        pair_weights = np.ones(num_pairs)
        pair_boxes = np.zeros((num_pairs, 4), dtype=np.int64)
        if self.mixup:
            pair_weights = beta_quantile(self.mixup, numbers[:, 1])
        if self.cutmix:
            boxes_drawn = self._boxes(beta_quantile(self.cutmix, numbers[:, 1]), numbers[:, 2:], plan.size)
            pair_boxes = np.where(cuts[:, None], boxes_drawn, 0)
            top, left, bottom, right = pair_boxes.T
            # A box clipped at the border is smaller than 1 − λ, so the weight is computed from the actual area.
            share = 1.0 - (bottom - top) * (right - left) / (plan.size[0] * plan.size[1])
            pair_weights = np.where(cuts, share, pair_weights)
        weights[: 2 * num_pairs] = np.repeat(pair_weights, 2)
        boxes[: 2 * num_pairs] = np.repeat(pair_boxes, 2, axis=0)
        return weights, boxes

    def _share_of_cutmix(self) -> float:
        """Probability that a pair uses CutMix."""
        if self.mixup and self.cutmix:
            return 0.5
        return 1.0 if self.cutmix else 0.0

    def _boxes(
        self, kept: NDArray[np.float64], centres: NDArray[np.float64], size: tuple[int, int]
    ) -> NDArray[np.int64]:
        """Return boxes of area 1 − λ about uniform centres, clipped at the border."""
        extent = np.array(size)
        half = np.sqrt(1.0 - kept)[:, None] * extent / 2
        centre = np.floor(centres * extent)
        low = np.clip(np.floor(centre - half), 0, extent)
        high = np.clip(np.floor(centre + half), 0, extent)
        return np.concatenate([low, high], axis=1).astype(np.int64)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (N, 3, H, W) float.
            targets: (N,) class indices, or (N, L) multi-hot or soft.
            plan: Plan of this batch; its sample ids and epoch determine the random numbers.

        Returns:
            Images of the same shape and (N, L) soft targets.
        """
        device = images.device
        weights, boxes = self.weights(plan)
        partner = np.arange(len(plan))
        partner[: len(plan) // 2 * 2] ^= 1
        index = sent(torch.from_numpy(partner), device)
        weight = sent(torch.from_numpy(weights.astype(np.float32)), device)
        if targets.ndim == 1:
            targets = F.one_hot(targets, self.num_classes)
        targets = targets.to(torch.float32)
        mixed_targets = torch.lerp(targets[index], targets, weight[:, None])
        own_share = weight.view(-1, 1, 1, 1)
        if self.cutmix:
            own_share = self._own_share(own_share, sent(torch.from_numpy(boxes), device), plan.size)
        return torch.lerp(images[index], images, own_share), mixed_targets

    @staticmethod
    def _own_share(weight: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the weight of the image itself, (N, 1, H, W): 0 inside and 1 outside a box, λ everywhere without a
        box.
        """
        top, left, bottom, right = (edge.view(-1, 1, 1, 1) for edge in boxes.unbind(1))
        row = torch.arange(size[0], device=boxes.device).view(1, 1, -1, 1)
        column = torch.arange(size[1], device=boxes.device).view(1, 1, 1, -1)
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        has_box = (bottom > top) & (right > left)
        return torch.where(has_box, (~inside).to(weight.dtype), weight)
