"""Filter norms: a channel with a small filter contributes little.

Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017): score = ‖w_c‖₁ over the filter. L2 likewise; over all
members of a coupled group, as in DepGraph (Fang et al., CVPR 2023) when `members` is "all".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from image_classification.config import check_choice, check_setting
from pruning.criteria.criterion import GroupWeights, WeightCriterion, register_criterion

Members = Literal["out", "all"]
MEMBERS: tuple[Members, ...] = get_args(Members)
DEFAULT_MEMBERS: Members = "out"


def powered_norms(rows: Tensor, power: int) -> Tensor:
    """Compute Σ|w|^power over every row of (C, D), real or complex: (C,) float64."""
    rows = rows.abs() if rows.is_complex() else rows
    norms: Tensor = torch.linalg.vector_norm(rows, ord=power, dim=1, dtype=torch.float64)
    return norms**power


@register_criterion("magnitude")
class Magnitude(WeightCriterion):
    """L_p norm of all weights of a unit, including coupled layers: (Σ|w|^p)^(1/p).

    Args:
        power: p, 1 or 2.
        members: "out": weights that produce the unit (filters), as published. "all": also weights that read it.
    """

    def __init__(self, power: int = 1, members: Members = DEFAULT_MEMBERS) -> None:
        check_setting(power in (1, 2), "power", power, "choose 1 (L1) or 2 (L2)")
        check_choice("members", members, MEMBERS)
        self.power = power
        self.members = members

    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Return norms, (width,); if no weight has the requested role, of any weights that carry the units."""
        roles = ("out",) if self.members == "out" else ("out", "in")
        chosen = [m for m in group.members if m.role in roles and m.values.dim() > 1]
        # Computed weights may have no parameter that produces the units, only parameters that carry them.
        chosen = chosen or [m for m in group.members if m.values.dim() > 1] or list(group.members)
        if not chosen:
            return None
        sums = [m.add_to_units(powered_norms(m.slices(), self.power), group.width) for m in chosen]
        return torch.stack(sums).sum(0) ** (1.0 / self.power)


@register_criterion("magnitude-l2")
class MagnitudeL2(Magnitude):
    """`Magnitude` with p = 2."""

    def __init__(self, members: Members = DEFAULT_MEMBERS) -> None:
        super().__init__(power=2, members=members)
