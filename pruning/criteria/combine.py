"""Combination of two criteria, and normalisation of scores across groups.

Combination, per group:      score = (1 − β) · a/‖a‖₂ + β · b/‖b‖₂ Normalisation, per group:    score ÷ scale, scale =
mean, sum, max, L2 norm of the group's scores, or the MACs saved by one of its units.

`mean` is the default for a ranking over all groups, because it maps a group's average to 1 whatever the width, so wide
and narrow groups shrink in proportion unless their scores are uneven. `sum` and `l2` give wide groups small scores and
empty them first. `max` depends on a single channel. `none` compares numbers on different scales (DI, ranks and norms
grow with the size of the map or filter). `macs` is the loss per MAC and fits scores that estimate a change of the loss
(fisher, taylor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from image_classification.config import SettingError, check_choice, check_setting
from pruning.criteria.criterion import Criterion

Normalisation = Literal["mean", "sum", "max", "l2", "macs", "none"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)
DEFAULT_NORMALISATION: Normalisation = "mean"
DEFAULT_WEIGHT = 0.5

_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.abs().mean(),
    "sum": lambda values: values.abs().sum(),
    "max": lambda values: values.abs().amax(),
    "l2": lambda values: values.norm(),
}


def combine_scores(
    first: Mapping[int, Tensor], second: Mapping[int, Tensor], weight: float
) -> dict[int, Tensor]:
    """Combine the scores of two criteria.

    Args:
        first: Group index → (width,), a.
        second: The same for the other criterion, b.
        weight: β in [0, 1], the weight of the second criterion.

    Returns:
        Scores of the groups that both criteria have scored. All-zero scores stay zero.

    Raises:
        SettingError: β is not a share.
    """
    check_setting(0 <= weight <= 1, "weight", weight, "give a share between 0 and 1")
    return {
        index: (1 - weight) * _divided(scores, scores.norm())
        + weight * _divided(second[index], second[index].norm())
        for index, scores in first.items()
        if index in second
    }


def normalise_scores(
    scores: Mapping[int, Tensor],
    normalisation: Normalisation = DEFAULT_NORMALISATION,
    macs_per_unit: Mapping[int, float] | None = None,
) -> dict[int, Tensor]:
    """Bring the scores of all groups onto one scale, for a ranking over all of them.

    Args:
        scores: Group index → (width,). Scales are computed from absolute values, since scores are negative if a removal
            would be an improvement (saliency after a rewrite).
        normalisation: One of `NORMALISATIONS`.
        macs_per_unit: For "macs": MACs saved by removing one unit of a group. Units that save nothing get infinite
            scores, so that they are kept.

    Returns:
        New tensors. All-zero scores stay zero.

    Raises:
        SettingError: The method is unknown, or "macs" is given without the savings.
    """
    check_choice("normalisation", normalisation, NORMALISATIONS)
    if normalisation == "none":
        return {index: values.clone() for index, values in scores.items()}
    if normalisation == "macs":
        if macs_per_unit is None:
            raise SettingError("normalisation", "macs", "needs `macs_per_unit`, what each group's units save")
        return {index: _per_saving(values, macs_per_unit[index]) for index, values in scores.items()}
    return {index: _divided(values, _SCALES[normalisation](values)) for index, values in scores.items()}


def _per_saving(values: Tensor, saving: float) -> Tensor:
    return values / saving if saving > 0 else torch.full_like(values, torch.inf)


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    return values / scale if scale != 0 else values.clone()


class Combined(Criterion):
    """Weighted combination of two criteria; `score_groups` takes it like any other criterion.

    Args:
        first: The criterion of the scores a.
        second: The criterion of the scores b.
        weight: β in [0, 1], the weight of the second criterion.

    Raises:
        SettingError: β is not a share.
    """

    def __init__(self, first: Criterion, second: Criterion, weight: float = DEFAULT_WEIGHT) -> None:
        check_setting(0 <= weight <= 1, "weight", weight, "give a share between 0 and 1")
        self.first = first
        self.second = second
        self.weight = weight

    def combine(self, first: dict[int, Tensor], second: dict[int, Tensor]) -> dict[int, Tensor]:
        """Combine the scores of both: group index → (width,), for the groups that both have scored."""
        return combine_scores(first, second, self.weight)
