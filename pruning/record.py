"""What one rewrite did, as plain data: for people, reports and checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RewriteRecord:
    """What one rewrite did, as plain data.

    Attributes:
        rewrite: Number of the rewrite, from 1.
        iteration: Training iteration it happened after; -1 outside of training.
        widths: Group name → [before, after], changed groups only.
        costs: Metric → [before, after, baseline].
        loss: Calibration loss [before, after]; after is without any training.
        scores: Group name → [lowest score that stayed, highest score that went].
        candidates: The best candidates that were weighed.
        seconds: `score`, `search`, `rewrite`.
        explanation: Mean squared distance of the explanation from the original network's [before, after], if one is
            followed.
    """

    rewrite: int
    iteration: int
    widths: dict[str, list[int]]
    costs: dict[str, list[float]]
    loss: list[float]
    scores: dict[str, list[float]]
    candidates: list[dict[str, Any]]
    seconds: dict[str, float]
    explanation: list[float] = dataclasses.field(default_factory=list)

    def describe(self) -> str:
        """One line for people."""
        widths = ", ".join(f"{name} {before}→{after}" for name, (before, after) in self.widths.items())
        costs = ", ".join(
            f"{metric} {100 * after / base:.1f} %" for metric, (_, after, base) in self.costs.items()
        )
        seconds = sum(self.seconds.values())
        moved = (
            f"; explanation moved by {self.explanation[0]:.4g} → {self.explanation[1]:.4g}"
            if self.explanation
            else ""
        )
        return (
            f"rewrite {self.rewrite}: {widths or 'nothing to remove'}; {costs} of the original; calibration loss "
            f"{self.loss[0]:.4f} → {self.loss[1]:.4f}{moved}; {seconds:.2f} s"
        )
