"""What a search is: which channels leave at a rewrite, so that the next target of the budget's schedule is met.

Calibration data decides; validation data is never seen. A new search is a class with one function and a decorator:

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
#: What takes a little at a time while a network trains, and what takes everything at once.
DEFAULT_SEARCH, ONE_SHOT_SEARCH = "greedy", "sensitivity"
DEFAULT_SHORTLIST = 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to meet a target: a group that loses units.

    Attributes:
        group: Its name.
        num_units: How many it would lose.
        estimated: Estimated change of the calibration loss; None where there is no estimate.
        measured: Calibration loss without them; None if that was not measured.
    """

    group: str
    num_units: int
    estimated: float | None
    measured: float | None = None


@dataclasses.dataclass
class Decision:
    """What a search chose.

    Attributes:
        keep: Group index → positions that stay, ascending; only groups that change.
        candidates: What was weighed first, best estimate first (greedy only).
    """

    keep: dict[int, np.ndarray]
    candidates: list[Candidate] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Situation:
    """Everything a search may look at.

    Attributes:
        graph: Groups with their constraints.
        costs: Cost of any mask.
        scores: Group index → (width,) importance, larger is better; comparable within a group.
        targets: Metric → cost to end at.
        loss_change: Judges candidates on calibration data; None where no data is at hand (global and uniform).
    """

    graph: ChannelGraph
    costs: CostModel
    scores: Scores
    targets: Mapping[str, float]
    loss_change: LossChange | None = None

    def __post_init__(self) -> None:
        self.mask = np.ones(self.graph.num_units, dtype=bool)
        # A group without scores stays as it is.
        self.groups = [group for group in self.graph.prunable if group.index in self.scores]

    def most_behind(self) -> str | None:
        """The metric that is furthest above its target, relative to the baseline; None when all are met."""
        excess = {
            metric: (self.costs.cost(metric, self.mask) - target) / self.costs.baseline(metric)
            for metric, target in self.targets.items()
        }
        metric = max(excess, key=lambda name: excess[name])
        return metric if excess[metric] > 1e-9 else None

    def width(self, group: Group) -> int:
        """Units of a group that are still there."""
        return int(self.mask[group.units].sum())

    def widths_below(self, group: Group) -> list[int]:
        """Allowed widths below the present one, ascending."""
        return [width for width in self.graph.allowed_widths(group) if width < self.width(group)]

    def leaving(self, group: Group) -> np.ndarray:
        """Positions of the group's units that are still there, in the order they leave: the lowest-scored one first."""
        kept = np.flatnonzero(self.mask[group.units])
        # A stable order makes ties, and with them the choice, the same on every machine.
        leaving: np.ndarray = kept[np.argsort(self.scores[group.index][kept], kind="stable")]
        return leaving

    def lowest(self, group: Group, width: int) -> np.ndarray:
        """Unit ids that leave when the group shrinks to `width`."""
        units: np.ndarray = group.units[self.leaving(group)[: self.width(group) - width]]
        return units

    def without(self, units: np.ndarray) -> np.ndarray:
        """The present mask less these units."""
        mask = self.mask.copy()
        mask[units] = False
        return mask

    def keep(self, mask: np.ndarray) -> dict[int, np.ndarray]:
        """A mask as positions per changed group."""
        kept = {group.index: np.flatnonzero(mask[group.units]) for group in self.groups}
        return {
            index: positions
            for index, positions in kept.items()
            if len(positions) < self.graph.groups[index].width
        }


class Search(Protocol):
    """Chooses what leaves, so that every metric ends at or below its target."""

    def choose(self, situation: Situation) -> Decision:
        """What leaves at this rewrite. A pure function of the situation, so that all ranks choose alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of all searches; each takes those that its constructor has.

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
    """Class decorator: make a search known to `build_search` under a name.

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
    """Names of all registered searches, sorted."""
    return sorted(_REGISTRY)


def build_search(name: str, settings: SearchSettings | None = None) -> Search:
    """The search that is registered under a name.

    Args:
        name: One of `search_names()`.
        settings: Of the searches.

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
