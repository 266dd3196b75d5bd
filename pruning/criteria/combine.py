"""Two criteria as one, and scores of different groups on one scale.

Combination, per group:      score = (1 − β) · a/‖a‖₂ + β · b/‖b‖₂
Normalisation, per group:    score ÷ scale, scale = mean, sum, max, L2 norm of the group's scores, or the MACs that one
of its units saves.

Why `mean` is the default for one ranking over all groups: it makes "as good as the average of its group" equal
to 1 whatever the width, so wide and narrow groups shrink in proportion unless their scores are uneven. `sum` and `l2`
give wide groups small scores and empty them first; `max` hangs on a single channel; `none` compares numbers
with different units (DI, ranks and norms grow with the size of the map or filter); `macs` is the loss per
MAC and fits scores that estimate a change of the loss (fisher, taylor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NORMALISATIONS = ("mean", "sum", "max", "l2", "macs", "none")
DEFAULT_NORMALISATION = "mean"

_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.abs().mean(),
    "sum": lambda values: values.abs().sum(),
    "max": lambda values: values.abs().amax(),
    "l2": lambda values: values.norm(),
}


def combine_scores(
    first: Mapping[int, Tensor], second: Mapping[int, Tensor], weight: float
) -> dict[int, Tensor]:
    """Scores that hold both criteria.

    Args:
        first: Group index → (width,), a.
        second: The same of the other criterion, b.
        weight: β in [0, 1], the share of the second.

    Returns:
        The groups that both have scored. All-zero scores stay zero.

    Raises:
        ValueError: β is not a share.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the second criterion is {weight}: give a share between 0 and 1")
    return {
        index: (1 - weight) * _divided(scores, scores.norm())
        + weight * _divided(second[index], second[index].norm())
        for index, scores in first.items()
        if index in second
    }


def normalise_scores(
    scores: Mapping[int, Tensor],
    method: str = DEFAULT_NORMALISATION,
    macs_per_unit: Mapping[int, float] | None = None,
) -> dict[int, Tensor]:
    """Scores of all groups on one scale, so that one ranking can go over all of them.

    Args:
        scores: Group index → (width,) ≥ 0. Scales are made of absolute values, as scores that say a removal would do
            good (saliency after a rewrite) may be negative.
        method: One of `NORMALISATIONS`.
        macs_per_unit: For "macs": what removing one unit of a group saves. Where that is nothing, no score is low
            enough.

    Returns:
        New tensors. All-zero scores stay zero.

    Raises:
        ValueError: An unknown method, or "macs" without the savings.
    """
    if method not in NORMALISATIONS:
        raise ValueError(f"--score-normalisation {method!r}: choose from {', '.join(NORMALISATIONS)}")
    if method == "macs":
        if macs_per_unit is None:
            raise ValueError("--score-normalisation macs needs the MACs that each group's units save")
        return {
            index: values / macs_per_unit[index]
            if macs_per_unit[index] > 0
            else torch.full_like(values, torch.inf)
            for index, values in scores.items()
        }
    if method == "none":
        return {index: values.clone() for index, values in scores.items()}
    return {index: _divided(values, _SCALES[method](values)) for index, values in scores.items()}


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    return values / scale if scale != 0 else values.clone()
