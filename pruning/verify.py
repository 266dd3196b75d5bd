"""Tries every group before it is called prunable: the rewritten network must equal the masked one.

All groups are cut at once, by random halves (`trial.py`); where that fails, the first module that raises or
differs tells whose groups to look at, and these are given hidden widths (whole numbers that modules hold), tied,
coupled in another way, or frozen with the reason. So a few forward passes try everything.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from torch import nn

from pruning.building import build_graph, label
from pruning.channel_graph import ChannelGraph, Constraints
from pruning.groups import Group, as_units
from pruning.labelling import Choice, Labeller, Policy
from pruning.rehearsal import rehearsal
from pruning.tracing import Trace
from pruning.trial import Failure, first_failure, random_mask
from pruning.widths import hidden_widths, tie_widths

_MOST_ROUNDS = 60
_MOST_ATTEMPTS, _MOST_SINGLE = 8, 8
_FLIPPED = {
    "even": "free",
    "free": "even",
    "dims": "heads",
    "heads": "dims",
    "blocks": "positions",
    "positions": "blocks",
}
_BLOCKWISE = frozenset({"blocks", "positions", "heads"})


@dataclasses.dataclass
class Verdict:
    """Slices of a tensor that must stay, found by trial (or assumed, as in a module of the same kind).

    Attributes:
        positions: Which ones, among `extent`. In a tensor of another extent, as a module of the same kind may have,
            they mean nothing: all of its slices must stay.
    """

    tensor: str
    dim: int
    positions: np.ndarray
    extent: int
    reason: str
    assumed: bool

    def of(self, atoms: np.ndarray) -> np.ndarray:
        """Those of a tensor's atoms, (extent,), that must stay."""
        return atoms[self.positions] if len(atoms) == self.extent else atoms


@dataclasses.dataclass
class _State:
    """What has been learned so far.

    `remedies` holds, per kind of module, what was tried; `messages` what failed first.
    """

    policy: Policy = dataclasses.field(default_factory=dict)
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    use_attributes: bool = False
    barred_attributes: set[str] = dataclasses.field(default_factory=set)
    tied: set[str] = dataclasses.field(default_factory=set)
    flipped: set[str] = dataclasses.field(default_factory=set)
    remedies: dict[str, int] = dataclasses.field(default_factory=dict)
    messages: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Case:
    """The network that is tried, and how to try something with it."""

    model: nn.Module
    images: tuple[Any, ...]
    traces: list[Trace]
    constraints: Constraints

    def graph_of(self, labeller: Labeller) -> ChannelGraph:
        """The graph that labels make as they are now."""
        return build_graph(self.model, self.traces, self.constraints, labeller)

    def failure_of(self, graph: ChannelGraph, index: int) -> Failure | None:
        """What fails when only one group is cut."""
        mask = random_mask(graph, [graph.groups[index]])
        return first_failure(self.model, self.images, self.traces, graph, mask)


def verified_graph(
    model: nn.Module,
    images: tuple[Any, ...],
    traces: list[Trace],
    constraints: Constraints,
    choices: Policy | None = None,
) -> ChannelGraph:
    """Build the graph and try it until nothing fails. Call inside `undisturbed`.

    Args:
        choices: Couplings to take over; without them the better ones are looked for.
    """
    state = _State(policy=dict(choices) if choices else loosened(model, traces, constraints))

    case = _Case(model, images, traces, constraints)
    with rehearsal(model, images):
        for _ in range(_MOST_ROUNDS):
            labeller, graph = _build(model, traces, constraints, state)
            failure = first_failure(model, images, traces, graph)
            if failure is None:
                return _without_assumptions(model, images, traces, constraints, state, graph)
            _learn(case, state, labeller, graph, failure)
        _, graph = _build(model, traces, constraints, state)
        failure = first_failure(model, images, traces, graph)
        if failure is not None:
            graph.freeze(graph.prunable, f"could not be verified: {failure.message}")
        return graph


def _without_assumptions(
    model: nn.Module,
    images: tuple[Any, ...],
    traces: list[Trace],
    constraints: Constraints,
    state: _State,
    graph: ChannelGraph,
) -> ChannelGraph:
    """Try once to free what was only frozen because a module of the same kind failed."""
    if not any(verdict.assumed for verdict in state.verdicts):
        return graph
    sure = [verdict for verdict in state.verdicts if not verdict.assumed]
    _, bolder = _build(model, traces, constraints, dataclasses.replace(state, verdicts=sure))
    failure = first_failure(model, images, traces, bolder)
    return graph if failure is not None else bolder


def _build(
    model: nn.Module, traces: list[Trace], constraints: Constraints, state: _State
) -> tuple[Labeller, ChannelGraph]:
    labeller = label(traces, state.policy)
    for verdict in state.verdicts:
        atoms = labeller.parameter_atoms.get((verdict.tensor, verdict.dim))
        if atoms is not None:
            labeller.table.freeze(verdict.of(atoms), verdict.reason)
    tie_widths(model, labeller, state.tied)
    graph = build_graph(model, traces, constraints, labeller)
    if state.use_attributes:
        known = {(a.module, a.attribute, a.item) for a in graph.attributes}
        for attribute in hidden_widths(model, labeller, graph):
            key = (attribute.module, attribute.attribute, attribute.item)
            if attribute.module not in state.barred_attributes and key not in known:
                graph.attributes.append(attribute)
    return labeller, graph


def loosened(model: nn.Module, traces: list[Trace], constraints: Constraints) -> Policy:
    """Other couplings for operators that tie or freeze their channels, where that frees some.

    Those of a class of modules are tried together, since what is right in one is right in all.
    """

    def built(policy: Policy) -> tuple[Labeller, ChannelGraph]:
        labeller = label(traces, policy)
        return labeller, build_graph(model, traces, constraints, labeller)

    policy: Policy = {}
    labeller, graph = built(policy)
    best = _freedom(graph)
    for attempt in _attempts(model, _choices_of_the_stuck(labeller, graph)):
        candidate = {**policy, **attempt}
        if candidate == policy:
            continue
        labeller, graph = built(candidate)
        if _freedom(graph) > best:
            best, policy = _freedom(graph), candidate
            if not _choices_of_the_stuck(labeller, graph):
                break
    return policy


def _attempts(model: nn.Module, stuck: dict[str, Choice]) -> list[Policy]:
    """Choices to flip: all; those of each class of modules; the first, second, … of each class."""
    together: Policy = {}
    by_class: dict[type, Policy] = {}
    by_place: dict[tuple[type, int], Policy] = {}
    seen: Counter[str] = Counter()
    for key, choice in stuck.items():
        kind, place = type(model.get_submodule(choice.module)), seen[choice.module]
        seen[choice.module] += 1
        for flips in (together, by_class.setdefault(kind, {}), by_place.setdefault((kind, place), {})):
            flips[key] = _FLIPPED[choice.chosen]
    found: list[Policy] = []
    for flips in (together, *by_class.values(), *by_place.values()):
        found += [flips] if flips and flips not in found else []
    return found[:_MOST_ATTEMPTS]


def _choices_of_the_stuck(labeller: Labeller, graph: ChannelGraph) -> dict[str, Choice]:
    """Choices that touch groups which cannot be cut though they are no output."""
    stuck = {
        group.index
        for group in graph.groups
        if not group.prunable and group.width * group.channels_per_unit > 1 and not _is_outer(group)
    }
    return {
        key: choice
        for key, choice in labeller.choices.items()
        if choice.chosen in _BLOCKWISE
        and stuck & set(graph.groups_in(as_units(graph.unit_of_atom, choice.atoms).reshape(-1)))
    }


def _is_outer(group: Group) -> bool:
    return group.reason in ("the network's output", "the network's input")


def _freedom(graph: ChannelGraph) -> int:
    return sum(group.width - 1 for group in graph.prunable)


# -- learning from a failure -------------------------------------------------------------------------------


def _learn(case: _Case, state: _State, labeller: Labeller, graph: ChannelGraph, failure: Failure) -> None:
    """Change one thing: hidden widths, tied ones, another coupling, no hidden widths here, or frozen groups."""
    if not state.use_attributes:
        state.use_attributes = True
        return
    model = case.model
    kind, siblings = _siblings(model, failure.module)
    state.messages.setdefault(kind, failure.message)
    own = {a.module for a in graph.attributes if a.found} & siblings
    while True:
        step = state.remedies.get(kind, 0)
        state.remedies[kind] = step + 1
        hopeless = isinstance(model.get_submodule(failure.module), nn.MultiheadAttention)
        free = own - state.barred_attributes
        if step == 0 and not hopeless and free and _tie(case, labeller, graph, free):
            state.tied |= free
            return
        if step == 1 and not hopeless and _flip(state, labeller, siblings):
            return
        if step == 2 and free:
            state.barred_attributes |= own
            return
        if step == 3 and (_unflip(state, labeller, siblings) or siblings & state.tied):
            state.barred_attributes -= siblings  # nothing helped: back to the first coupling
            state.tied -= siblings
            return
        if step > 3:
            local = failure.raised and failure.module  # else any group may be to blame
            if local or not _freeze_culprit(case, state, graph, failure.module):
                _freeze(state, labeller, graph, failure.module, siblings, state.messages[kind])
            return


def _tie(case: _Case, labeller: Labeller, graph: ChannelGraph, modules: set[str]) -> bool:
    """Let widths that share a number lose the same, unless that ties all channels of a group together."""
    return tie_widths(case.model, labeller, modules) and _num_single(case.graph_of(labeller)) <= _num_single(
        graph
    )


def _num_single(graph: ChannelGraph) -> int:
    return sum(group.width == 1 for group in graph.groups)


def _siblings(model: nn.Module, name: str) -> tuple[str, set[str]]:
    """The kind of a module and all modules of that kind.

    A PyTorch layer is of the kind "layer of that name within a parent of that class".
    """
    modules = dict(model.named_modules())
    module = modules[name]
    if not type(module).__module__.startswith("torch.nn"):
        return _class_path(module), {n for n, other in modules.items() if type(other) is type(module)}
    parent, _, child = name.rpartition(".")
    owner = modules[parent]
    if type(owner).__module__.startswith("torch.nn"):
        return name, {name}
    names = {f"{n}.{child}".lstrip(".") for n, other in modules.items() if type(other) is type(owner)}
    return f"{_class_path(owner)}.{child}", {n for n in names if type(modules.get(n)) is type(module)}


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _suspects(labeller: Labeller, graph: ChannelGraph, module: str) -> set[int]:
    """Prunable groups that a module counts, or else reads; then those of the modules around it; then its own."""
    around = [module]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    for name in around:
        counted = [
            as_units(graph.unit_of_atom, u.atoms).reshape(-1) for u in labeller.size_uses if u.module == name
        ]
        read = [place.units for place in graph.places if place.module == name and place.kind == "input"]
        for vectors in (counted, read):
            groups = _prunable_in(graph, vectors)
            if groups:
                return groups
    return _prunable_in(
        graph, [axis.units for axis in graph.axes if axis.tensor.rpartition(".")[0] == module]
    )


def _prunable_in(graph: ChannelGraph, vectors: list[np.ndarray]) -> set[int]:
    groups = {index for units in vectors for index in graph.groups_in(units)}
    return {index for index in groups if graph.groups[index].prunable}


def _flip(state: _State, labeller: Labeller, modules: set[str]) -> bool:
    """Couple the other way what these modules couple by choice."""
    flipped = False
    for key, choice in labeller.choices.items():
        if choice.module in modules and key not in state.policy and choice.chosen in _FLIPPED:
            state.policy[key] = _FLIPPED[choice.chosen]
            state.flipped.add(key)
            flipped = True
    return flipped


def _unflip(state: _State, labeller: Labeller, modules: set[str]) -> bool:
    keys = [
        key for key, choice in labeller.choices.items() if choice.module in modules and key in state.flipped
    ]
    for key in keys:
        state.flipped.discard(key)
        del state.policy[key]
    return bool(keys)


def _freeze(
    state: _State, labeller: Labeller, graph: ChannelGraph, failed: str, modules: set[str], message: str
) -> None:
    """Freeze the most local suspect of the module that failed, and of the others of its kind.

    Without any suspect there, everything that can still be cut is one.
    """
    if not _suspects(labeller, graph, failed):
        modules = {failed}
    for module in sorted(modules):
        suspects = _suspects(labeller, graph, module)
        if module == failed and not suspects:
            suspects = {group.index for group in graph.prunable}
        if not suspects:
            continue
        group = min(suspects, key=lambda index: (len(graph.members(index)), index))
        member = graph.members(group)[0]
        positions = np.flatnonzero(member.positions >= 0)
        reason = f"cannot be cut: {message}"
        extent = len(member.positions)
        state.verdicts.append(Verdict(member.tensor, member.dim, positions, extent, reason, module != failed))


def _freeze_culprit(case: _Case, state: _State, graph: ChannelGraph, failed: str) -> bool:
    """Cut groups around the failed module one by one; freeze the first that fails alone, and those like it.

    What a module computes otherwise on fewer channels may be an operator's doing that ran before it in a module
    around it, so its own groups are only the first to be tried.
    """
    for index, owner in _around(graph, failed)[:_MOST_SINGLE]:
        failure = case.failure_of(graph, index)
        if failure is None:
            continue
        members = [m for m in graph.members(index) if owner and m.tensor.startswith(f"{owner}.")]
        member = (members or graph.members(index))[0]
        suffix = member.tensor.removeprefix(owner)
        likes = {owner} | (_siblings(case.model, owner)[1] if members and owner else set())
        positions = np.flatnonzero(member.positions >= 0)
        reason = f"cannot be cut: {failure.message}"
        for like in sorted(likes):
            name = member.tensor if like in (owner, "") else like + suffix
            extent = len(member.positions)
            state.verdicts.append(Verdict(name, member.dim, positions, extent, reason, like != owner))
        return True
    return False


def _around(graph: ChannelGraph, failed: str) -> list[tuple[int, str]]:
    """Prunable groups in a module, then in the modules around it, with the module each was met in."""
    found: dict[int, str] = {}
    owners = [failed]
    while owners[-1]:
        owners.append(owners[-1].rpartition(".")[0])
    for owner in owners:
        inside = [p.units for p in graph.places if not owner or f"{p.module}.".startswith(f"{owner}.")]
        groups = _prunable_in(graph, inside)
        for index in sorted(groups, key=lambda index: (len(graph.members(index)), index)):
            found.setdefault(index, owner)
    return list(found.items())
