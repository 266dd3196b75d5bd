"""Alternative couplings, chosen before any trial: those that free channels which the default ties or freezes."""

from __future__ import annotations

from collections import Counter

from torch import nn

from pruning.engine.building import build_graph, label_case
from pruning.engine.case import Case
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.coupling import as_units
from pruning.engine.groups import Group
from pruning.engine.labeller import Choice, Labeller, Policy

_MOST_ATTEMPTS = 8
#: The other way of every choice.
FLIPPED = {
    "even": "free",
    "free": "even",
    "dims": "heads",
    "heads": "dims",
    "blocks": "positions",
    "positions": "blocks",
    "longest": "shortest",
    "shortest": "longest",
    "tiles": "copies",
    "copies": "tiles",
}
#: Choices between whole heads or groups and the same positions of all, or between other sorts of labels.
BLOCKWISE = frozenset(FLIPPED) - {"even", "free"}


def loosened(case: Case) -> Policy:
    """Return alternative couplings for operators that tie or freeze their channels, where that frees some.

    The operators of a class of modules are tried together, since a coupling that is right in one is right in all.
    """

    def built(policy: Policy) -> tuple[Labeller, ChannelGraph]:
        labeller = label_case(case, policy)
        return labeller, build_graph(case, labeller)

    policy: Policy = {}
    labeller, graph = built(policy)
    best = freedom(graph)
    for attempt in _attempts(case.model, _choices_of_the_stuck(labeller, graph)):
        candidate = {**policy, **attempt}
        if candidate == policy:
            continue
        labeller, graph = built(candidate)
        if freedom(graph) > best:
            best = freedom(graph)
            policy = candidate
            if not _choices_of_the_stuck(labeller, graph):
                break
    return policy


def freedom(graph: ChannelGraph) -> int:
    """Return the number of units that could be removed."""
    return sum(group.width - 1 for group in graph.prunable)


def _attempts(model: nn.Module, stuck: dict[str, Choice]) -> list[Policy]:
    """Return sets of choices to flip: all; those of each class of modules; the first, second, … of each class."""
    together: Policy = {}
    by_class: dict[type, Policy] = {}
    by_place: dict[tuple[type, int], Policy] = {}
    seen: Counter[str] = Counter()
    for key, choice in stuck.items():
        kind = type(model.get_submodule(choice.module))
        place = seen[choice.module]
        seen[choice.module] += 1
        for flips in (together, by_class.setdefault(kind, {}), by_place.setdefault((kind, place), {})):
            flips[key] = FLIPPED[choice.chosen]
    found: list[Policy] = []
    for flips in (together, *by_class.values(), *by_place.values()):
        if flips and flips not in found:
            found.append(flips)
    return found[:_MOST_ATTEMPTS]


def _choices_of_the_stuck(labeller: Labeller, graph: ChannelGraph) -> dict[str, Choice]:
    """Return the choices that touch groups which cannot be cut though they are not outputs."""
    stuck = {group.index for group in graph.groups if _is_stuck(group)}
    found = {}
    for key, choice in labeller.choices.items():
        if choice.chosen in BLOCKWISE:
            units = as_units(graph.unit_of_atom, choice.atoms).reshape(-1)
            if stuck.intersection(graph.groups_in(units)):
                found[key] = choice
    return found


def _is_stuck(group: Group) -> bool:
    is_outer = group.reason in ("the network's output", "the network's input")
    return not group.prunable and not is_outer and group.width * group.channels_per_unit > 1
