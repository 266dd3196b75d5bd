"""Registry of figures: code that logs a figure registers its unit and format here.

Keys follow common usage (`train.loss`, `val.top1`, …); docs/report-keys.md explains them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

#: Prefixes of validation figures: of the network, and of its averaged weights.
VALIDATIONS = ("val", "val_ema")


@dataclasses.dataclass(frozen=True)
class Figure:
    """Display settings of a figure.

    Attributes:
        format: Python's format specification, such as ".2f"; None for the console's own.
        unit: Unit, such as "%" or "img/s".
        steers: Whether the screen shows it at epochs and logging steps; all figures are in the report.
    """

    format: str | None = None
    unit: str | None = None
    steers: bool = False


#: Key → figure, of all modules imported so far.
FIGURES: dict[str, Figure] = {}


def register_figures(prefixes: str | Iterable[str], figures: Mapping[str, Figure]) -> None:
    """Register figures.

    Args:
        prefixes: Part of the key before the dot, such as "train"; several if the same figures occur under several
            prefixes.
        figures: Part of the key after the dot → display settings.
    """
    for prefix in (prefixes,) if isinstance(prefixes, str) else prefixes:
        for name, figure in figures.items():
            FIGURES[f"{prefix}.{name}"] = figure


def steering(figures: Mapping[str, object]) -> dict[str, object]:
    """Return those figures that the screen shows at epochs and logging steps."""
    return {key: value for key, value in figures.items() if FIGURES.get(key, Figure()).steers}


def curves(step: Sequence[int] | str, data: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a step, `train.loss` as `train/loss`; figures of epochs and runs get separate names."""
    figures: dict[str, float] = {}
    for key, value in data.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            ending = "_epoch" if key.startswith("train.") and len(step) != 2 else ""
            figures[key.replace(".", "/", 1) + ending] = float(value)
    return figures
