"""One criterion made of two, written FIRST+SECOND: score = (1 − β) · a/‖a‖₂ + β · b/‖b‖₂ within every group.

Both are scored in one pass over the calibration batches; `combine_scores` has the formula. For the saliency score
beside discriminant information (`discriminant+saliency`) β is `--saliency-weight`.
"""

from __future__ import annotations

from torch import Tensor

from pruning.criteria.base import Criterion
from pruning.criteria.combine import combine_scores


class Combined(Criterion):
    """Two criteria with a weight; `score_groups` takes it like any other.

    Args:
        first: a.
        second: b.
        weight: β in [0, 1], the share of the second.

    Raises:
        ValueError: β is not a share.
    """

    def __init__(self, first: Criterion, second: Criterion, weight: float = 0.5) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"--saliency-weight {weight}: give a share between 0 and 1")
        self.first, self.second, self.weight = first, second, weight

    def combine(self, first: dict[int, Tensor], second: dict[int, Tensor]) -> dict[int, Tensor]:
        """Scores of both as one: group index → (width,), the groups that both have scored."""
        return combine_scores(first, second, self.weight)
