"""The interface of searches, which choose the channels to remove so that the next target of the budget's schedule is
met.

Calibration data decides; validation data is never used. A new search is a class with one function and a decorator:

    @register_search("halve")
    class Halve:
        def choose(self, situation: Situation) -> Decision: ...
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np

from image_classification.config import check_choice
from pruning.costs.cost_model import CostModel
from pruning.criteria.combine import DEFAULT_NORMALISATION, Normalisation
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.search.loss_change import LossChange

Scores = Mapping[int, np.ndarray]
#: Default for gradual pruning while a network trains, and for a single cut.
DEFAULT_SEARCH, ONE_SHOT_SEARCH = "greedy", "sensitivity"
DEFAULT_SHORTLIST = 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to meet a target: a group that loses units.

    Attributes:
        group: Name of the group.
        num_units: Number of units it would lose.
        estimated: Estimated change of the calibration loss; None if there is no estimate.
        measured: Measured calibration loss without them; None if not measured.
    """

    group: str
    num_units: int
    estimated: float | None
    measured: float | None = None


@dataclasses.dataclass
class Decision:
    """The choice of a search.

    Attributes:
        keep: Group index → positions that stay, ascending; only for groups that change.
        candidates: Candidates of the first instalment, best estimate first (greedy only).
    """

    keep: dict[int, np.ndarray]
    candidates: list[Candidate] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Situation:
    """Everything a search may use.

    Attributes:
        graph: Groups with their constraints.
        costs: Cost of any mask.
        scores: Group index → (width,) importance, larger is better; comparable within a group.
        targets: Metric → cost to reach.
        loss_change: Compares candidates on calibration data; None without data (global and uniform).
    """

    graph: ChannelGraph
    costs: CostModel
    scores: Scores
    targets: Mapping[str, float]
    loss_change: LossChange | None = None

    def __post_init__(self) -> None:
        self.mask = np.ones(self.graph.num_units, dtype=bool)
        # Groups without scores are left alone.
        self.groups = [group for group in self.graph.prunable if group.index in self.scores]

    def most_behind(self) -> str | None:
        """Return the metric furthest above its target, relative to the baseline; None if all are met."""
        excess = {
            metric: (self.costs.cost(metric, self.mask) - target) / self.costs.baseline(metric)
            for metric, target in self.targets.items()
        }
        metric = max(excess, key=lambda name: excess[name])
        return metric if excess[metric] > 1e-9 else None

    def width(self, group: Group) -> int:
        """Return the number of a group's remaining units."""
        return int(self.mask[group.units].sum())

    def widths_below(self, group: Group) -> list[int]:
        """Return the allowed widths below the current one, ascending."""
        return [width for width in self.graph.allowed_widths(group) if width < self.width(group)]

    def leaving(self, group: Group) -> np.ndarray:
        """Return the positions of the group's remaining units in order of removal: the lowest-scored first."""
        kept = np.flatnonzero(self.mask[group.units])
        # A stable sort makes ties, and with them the choice, the same on every machine.
        leaving: np.ndarray = kept[np.argsort(self.scores[group.index][kept], kind="stable")]
        return leaving

    def lowest(self, group: Group, width: int) -> np.ndarray:
        """Return the ids of units removed when the group shrinks to `width`."""
        units: np.ndarray = group.units[self.leaving(group)[: self.width(group) - width]]
        return units

    def without(self, units: np.ndarray) -> np.ndarray:
        """Return the current mask without these units."""
        mask = self.mask.copy()
        mask[units] = False
        return mask

    def keep(self, mask: np.ndarray) -> dict[int, np.ndarray]:
        """Convert a mask to positions per changed group."""
        kept = {group.index: np.flatnonzero(mask[group.units]) for group in self.groups}
        return {
            index: positions
            for index, positions in kept.items()
            if len(positions) < self.graph.groups[index].width
        }


class Search(Protocol):
    """Chooses the channels to remove, so that every metric ends at or below its target."""

    def choose(self, situation: Situation) -> Decision:
        """Choose what to remove at this rewrite. A pure function of the situation, so that all ranks choose alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of all searches; each search uses those that its constructor accepts.

    Attributes:
        shortlist, instalments: See `GreedySearch`.
        normalisation: See `GlobalSearch`.
    """

    shortlist: int = DEFAULT_SHORTLIST
    instalments: int | None = None
    normalisation: Normalisation = DEFAULT_NORMALISATION


S = TypeVar("S", bound=type[Search])
_REGISTRY: dict[str, type[Search]] = {}


def register_search(name: str) -> Callable[[S], S]:
    """Class decorator that registers a search for `build_search` under a name.

    Raises:
        ValueError: The name is taken by another class.
    """

    def register(cls: S) -> S:
        taken = _REGISTRY.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"search name {name!r} is taken by {taken.__qualname__}: choose another")
        _REGISTRY[name] = cls
        return cls

    return register


def search_names() -> list[str]:
    """Return the names of all registered searches, sorted."""
    return sorted(_REGISTRY)


def build_search(name: str, settings: SearchSettings | None = None) -> Search:
    """Build the search registered under a name.

    Args:
        name: One of `search_names()`.
        settings: Settings of the searches.

    Raises:
        SettingError: There is no such search; the nearest name is suggested.
    """
    check_choice("search", name, search_names())
    kind = _REGISTRY[name]
    settings = settings or SearchSettings()
    taken = inspect.signature(kind).parameters
    options = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name in taken
    }
    return kind(**options)
