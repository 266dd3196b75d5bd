"""The register of figures: who logs a figure says here what its unit is and how it is shown.

Keys are those of the field (`train.loss`, `val.top1`, …); docs/report-keys.md says what they mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

#: Prefixes of the figures of a validation: of the network, and of its averaged weights.
VALIDATIONS = ("val", "val_ema")


@dataclasses.dataclass(frozen=True)
class Figure:
    """How a figure is shown.

    Attributes:
        format: Python's format specification, such as ".2f"; None for the console's own.
        unit: Such as "%" or "img/s".
        steers: Whether the screen shows it at epochs and logging steps; all figures are in the report.
    """

    format: str | None = None
    unit: str | None = None
    steers: bool = False


#: Key → figure, of all modules that have been imported.
FIGURES: dict[str, Figure] = {}


def register_figures(prefixes: str | Iterable[str], figures: Mapping[str, Figure]) -> None:
    """Register figures.

    Args:
        prefixes: What stands before the dot, such as "train"; several where the same figures have several.
        figures: Name behind the dot → how it is shown.
    """
    for prefix in (prefixes,) if isinstance(prefixes, str) else prefixes:
        for name, figure in figures.items():
            FIGURES[f"{prefix}.{name}"] = figure


def steering(figures: Mapping[str, object]) -> dict[str, object]:
    """Those figures that the screen shows at epochs and logging steps."""
    return {key: value for key, value in figures.items() if FIGURES.get(key, Figure()).steers}


def curves(step: Sequence[int] | str, data: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a step, `train.loss` as `train/loss`; those of whole epochs and runs by names of their own."""
    figures: dict[str, float] = {}
    for key, value in data.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            ending = "_epoch" if key.startswith("train.") and len(step) != 2 else ""
            figures[key.replace(".", "/", 1) + ending] = float(value)
    return figures
