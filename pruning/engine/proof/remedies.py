"""Remedies for a failed trial, tried in order for every kind of module.

A failure occurs in a module, but a remedy that is right for one module is right for all of its kind, so remedies apply
to kinds. Each takes a *measure*, and the graph is built with all measures taken so far. In the end measures that turn
out not to be needed are dropped (`verification.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from torch import nn

from image_classification.models.module_tree import named_modules
from pruning.engine.building import build_graph
from pruning.engine.case import Case
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.code_lines import line_around
from pruning.engine.coupling import as_units, literal_around
from pruning.engine.groups import Member
from pruning.engine.labeller import Labeller, Policy
from pruning.engine.native_layers import is_native
from pruning.engine.proof.agreement_of_runs import Failure
from pruning.engine.proof.hidden_widths import public, tie_shapes, tie_widths
from pruning.engine.proof.loosening import BLOCKWISE, FLIPPED
from pruning.engine.proof.trial import Trial
from pruning.engine.proof.trial_masks import random_mask

_MOST_SINGLE = 8


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Slices of a tensor that must stay, found by trial (or assumed, as in a module of the same kind).

    Attributes:
        tensor, dim: Which dimension of which parameter or buffer.
        positions: Which slices, among `extent`. In a tensor of another extent, as a module of the same kind may
            have, they mean nothing: all of its slices must stay.
        reason: Why, in words.
        assumed: Another module of the kind failed, not this one.
    """

    tensor: str
    dim: int
    positions: np.ndarray
    extent: int
    reason: str
    assumed: bool

    def of(self, atoms: np.ndarray) -> np.ndarray:
        """Return those of a tensor's atoms, (extent,), that must stay."""
        return atoms[self.positions] if len(atoms) == self.extent else atoms


@dataclasses.dataclass(frozen=True)
class Measure:
    """The changes made by one remedy.

    Attributes:
        remedy: Its name.
        kind: The kind of modules it is for; "" is the whole network.
        follows: Whole numbers that modules hold follow the widths that they equal.
        unfollowed: Modules whose numbers stay as they are nevertheless.
        tied: (module, attribute) of numbers that widths share, which lose the same therefore.
        shaped: Modules in which widths may have been computed from each other, and which widths (see `tie_shapes`).
        couplings: Choices of operators that are made the other way.
        verdicts: Slices that must stay.
    """

    remedy: str
    kind: str = ""
    follows: bool = False
    unfollowed: frozenset[str] = frozenset()
    tied: frozenset[tuple[str, str]] = frozenset()
    shaped: tuple[frozenset[str], str] = (frozenset(), "")
    couplings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measures:
    """All measures taken so far, in order.

    Attributes:
        couplings: Choices of operators that were made before any trial.
        taken: The measures.
        num_tried: Per kind of module, how many remedies of the list were tried.
        messages: Per kind of module, what failed first when whole numbers followed.
        ties_shapes: Widths that may have been computed from each other may be tied.
        given: The choices made before any trial are a user's, and stand.
    """

    couplings: Policy
    taken: tuple[Measure, ...] = ()
    num_tried: Mapping[str, int] = dataclasses.field(default_factory=dict)
    messages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ties_shapes: bool = True
    given: bool = False

    @property
    def policy(self) -> Policy:
        """The choices of operators, with those that measures have made the other way."""
        policy = dict(self.couplings)
        for measure in self.taken:
            policy.update(measure.couplings)
        return policy

    def is_open(self, key: str) -> bool:
        """Whether a choice of an operator can be made the other way: it was not yet, nor did a user make it."""
        made = any(key in measure.couplings for measure in self.taken)
        return not made and not (self.given and key in self.couplings)

    @property
    def follows(self) -> bool:
        """Whether whole numbers follow widths."""
        return any(measure.follows for measure in self.taken)

    @property
    def unfollowed(self) -> set[str]:
        """Modules whose whole numbers stay as they are."""
        return {name for measure in self.taken for name in measure.unfollowed}

    @property
    def tied(self) -> set[tuple[str, str]]:
        """(module, attribute) of numbers that widths share."""
        return {number for measure in self.taken for number in measure.tied}

    @property
    def shaped(self) -> list[tuple[frozenset[str], str]]:
        """Modules in which widths were computed from each other, and from which."""
        return [measure.shaped for measure in self.taken if measure.shaped[0]]

    @property
    def verdicts(self) -> list[Verdict]:
        """Slices that must stay."""
        return [verdict for measure in self.taken for verdict in measure.verdicts]

    def plus(self, measure: Measure) -> Measures:
        """Return these measures and one more."""
        return dataclasses.replace(self, taken=(*self.taken, measure))

    def is_as(self, other: Measures) -> bool:
        """Whether the same measures were taken."""
        return list(map(id, self.taken)) == list(map(id, other.taken))

    def without(self, measures: Iterable[Measure]) -> Measures:
        """Return these measures without some of them."""
        gone = {id(measure) for measure in measures}
        return dataclasses.replace(self, taken=tuple(m for m in self.taken if id(m) not in gone))

    def untied(self, attribute: str) -> Measures:
        """Return the measures without the ties of one attribute, given by name."""
        taken = []
        for measure in self.taken:
            tied = frozenset(number for number in measure.tied if number[1] != attribute)
            if tied or not measure.tied:
                taken.append(dataclasses.replace(measure, tied=tied) if measure.tied != tied else measure)
        return dataclasses.replace(self, taken=tuple(taken))

    def without_assumptions(self) -> Measures:
        """Return the measures without verdicts on modules that did not fail themselves."""
        taken = []
        for measure in self.taken:
            verdicts = tuple(verdict for verdict in measure.verdicts if not verdict.assumed)
            if verdicts or not measure.verdicts:
                taken.append(dataclasses.replace(measure, verdicts=verdicts))
        return dataclasses.replace(self, taken=tuple(taken))


@dataclasses.dataclass(frozen=True)
class Trouble:
    """A trial that failed.

    Attributes:
        case: The network.
        labeller, graph: As built with all measures so far.
        failure: What failed.
        kind: The kind of the module where it failed (see `kind_of`).
        siblings: Names of all modules of that kind.
    """

    case: Case
    labeller: Labeller
    graph: ChannelGraph
    failure: Failure
    kind: str
    siblings: frozenset[str]

    def following(self, measures: Measures) -> frozenset[str]:
        """Modules of the kind that hold numbers which follow widths."""
        holders = {axis.module for axis in self.graph.attributes if axis.found}
        return frozenset(holders & self.siblings - measures.unfollowed)


#: Takes a measure against a trouble; None where it does not apply.
Remedy = Callable[[Trouble, Measures], "Measures | None"]


def follow_numbers(trouble: Trouble, measures: Measures) -> Measures | None:
    """Let integer attributes of modules follow the widths that they equal, in the whole network."""
    return None if measures.follows else measures.plus(Measure("follow_numbers", follows=True))


def tie_numbers(trouble: Trouble, measures: Measures) -> Measures | None:
    """Tie the widths of the kind's modules that share an attribute, unless that ties all channels of a group."""
    modules = trouble.following(measures)
    axes = [axis for axis in trouble.graph.attributes if axis.found and axis.module in modules]
    numbers = frozenset((axis.module, public(axis.attribute)) for axis in axes)
    if not numbers or not tie_widths(trouble.case.model, trouble.labeller, numbers):
        return None
    if _ties_whole_groups(trouble):
        return None
    return measures.plus(Measure("tie_numbers", trouble.kind, tied=numbers))


def couple_heads_otherwise(trouble: Trouble, measures: Measures) -> Measures | None:
    """Let operators of the kind's modules lose the same positions of all heads or groups instead of whole ones."""
    return _flipped(trouble, measures, trouble.siblings, BLOCKWISE)


def couple_otherwise(trouble: Trouble, measures: Measures) -> Measures | None:
    """Flip the coupling choice of operators in the kind's modules, where there is one."""
    return _flipped(trouble, measures, trouble.siblings, frozenset(FLIPPED))


def couple_culprit_otherwise(trouble: Trouble, measures: Measures) -> Measures | None:
    """Remove the same positions of all groups where a later module fails without whole ones."""
    open_choices = {
        key: choice
        for key, choice in trouble.labeller.choices.items()
        if measures.is_open(key) and choice.chosen in BLOCKWISE
    }
    found = _culprit(trouble) if open_choices else None
    if found is None:
        return None
    units = trouble.graph.unit_of_atom
    flipped = {
        key: FLIPPED[choice.chosen]
        for key, choice in open_choices.items()
        if found[0] in trouble.graph.groups_in(as_units(units, choice.atoms).reshape(-1))
    }
    return measures.plus(Measure("couple_otherwise", trouble.kind, couplings=flipped)) if flipped else None


def _flipped(
    trouble: Trouble, measures: Measures, modules: frozenset[str], kinds: frozenset[str]
) -> Measures | None:
    """Flip all choices of these kinds within the modules, except those already made."""
    flipped = {}
    for key, choice in trouble.labeller.choices.items():
        if choice.module in modules and measures.is_open(key) and choice.chosen in kinds:
            flipped[key] = FLIPPED[choice.chosen]
    if not flipped:
        return None
    return measures.plus(Measure("couple_otherwise", trouble.kind, couplings=flipped))


def leave_numbers(trouble: Trouble, measures: Measures) -> Measures | None:
    """Let integer attributes of the kind's modules stay unchanged."""
    modules = trouble.following(measures)
    if not modules:
        return None
    return measures.plus(Measure("leave_numbers", trouble.kind, unfollowed=modules))


def start_over(trouble: Trouble, measures: Measures) -> Measures | None:
    """Reset a kind that nothing has helped: its modules are coupled as at first, and numbers follow again."""
    own = [m for m in measures.taken if m.kind == trouble.kind and not m.follows and not m.verdicts]
    if not any(measure.tied or measure.couplings or measure.shaped[0] for measure in own):
        return None
    return measures.without(own)


def _tie_shapes(ties: str) -> Remedy:
    """Return the remedy that ties widths possibly computed from each other; it replaces the previous such one."""

    def tie(trouble: Trouble, measures: Measures) -> Measures | None:
        names = trouble.siblings
        if not (measures.ties_shapes and trouble.failure.raised):
            return None
        if not tie_shapes(trouble.case, trouble.labeller, names, ties):
            return None
        if _ties_whole_groups(trouble):
            return None
        before = [m for m in measures.taken if m.kind == trouble.kind and m.shaped[0]]
        measure = Measure("tie_shapes", trouble.kind, shaped=(names, ties))
        return measures.without(before).plus(measure)

    return tie


def freeze(trouble: Trouble, measures: Measures) -> Measures:
    """Freeze the channels that the failure is attributed to: the last resort, as often as needed.

    An exception has its cause in the module that raised. A module that merely computes something else may be affected
    by an operator that ran before it, so groups around it are cut one by one to find the culprit.
    """
    local = trouble.failure.raised and trouble.failure.module
    verdicts = () if local else _verdicts_on_the_culprit(trouble)
    if not verdicts:
        verdicts = _verdicts_on_suspects(trouble, measures.messages[trouble.kind])
    return measures.plus(Measure("freeze", trouble.kind, verdicts=verdicts))


#: In the order in which they are tried; after them `freeze`.
REMEDIES: tuple[Remedy, ...] = (
    follow_numbers,
    tie_numbers,
    couple_heads_otherwise,
    couple_otherwise,
    _tie_shapes("last"),
    leave_numbers,
    start_over,
    _tie_shapes("last"),
    _tie_shapes("input"),
    _tie_shapes("divisors"),
    _tie_shapes("parts"),
    couple_culprit_otherwise,
)


def remedied(
    case: Case, measures: Measures, labeller: Labeller, graph: ChannelGraph, failure: Failure
) -> Measures:
    """Return the measures with one more: the first applicable remedy that was not yet tried for the kind."""
    kind, siblings = kind_of(case.model, failure.module)
    trouble = Trouble(case, labeller, graph, failure, kind, siblings)
    if measures.follows:
        messages = {kind: _in_words(case.model, failure), **measures.messages}
        measures = dataclasses.replace(measures, messages=messages)
    for number in range(measures.num_tried.get(kind, 0), len(REMEDIES)):
        changed = REMEDIES[number](trouble, measures)
        if changed is not None:
            return dataclasses.replace(changed, num_tried={**measures.num_tried, kind: number + 1})
    return dataclasses.replace(
        freeze(trouble, measures), num_tried={**measures.num_tried, kind: len(REMEDIES)}
    )


def kind_of(model: nn.Module, name: str) -> tuple[str, frozenset[str]]:
    """Return the kind of a module, and the names of all modules of that kind.

    A kind is a class. A PyTorch layer is of the kind "layer of that name within a parent of that class".
    """
    modules = dict(named_modules(model))
    module = modules[name]
    if not is_native(module):
        same = {other for other, candidate in modules.items() if type(candidate) is type(module)}
        return _class_path(module), frozenset(same)
    parent, _, child = name.rpartition(".")
    owner = modules[parent]
    if is_native(owner):
        return name, frozenset({name})
    same = set()
    for other, candidate in modules.items():
        sibling = f"{other}.{child}".lstrip(".")
        if type(candidate) is type(owner) and type(modules.get(sibling)) is type(module):
            same.add(sibling)
    return f"{_class_path(owner)}.{child}", frozenset(same)


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _ties_whole_groups(trouble: Trouble) -> bool:
    """Whether the labels united since the graph was built tie all channels of some group."""
    tied = build_graph(trouble.case, trouble.labeller)
    single = [sum(group.width == 1 for group in graph.groups) for graph in (tied, trouble.graph)]
    return single[0] > single[1]


# -- whom a failure is put down to -------------------------------------------------------------------------


def _verdicts_on_suspects(trouble: Trouble, message: str) -> tuple[Verdict, ...]:
    """Return verdicts on the most local suspect of the failed module, and of the others of its kind.

    Without any suspect there, everything that can still be cut is suspect.
    """
    graph = trouble.graph
    failed = trouble.failure.module
    modules = sorted(trouble.siblings) if _suspects(trouble.labeller, graph, failed) else [failed]
    verdicts = []
    for module in modules:
        suspects = _suspects(trouble.labeller, graph, module)
        if module == failed and not suspects:
            suspects = {group.index for group in graph.prunable}
        if suspects:
            index = _by_locality(graph, suspects)[0]
            member = graph.members(index)[0]
            split = _number_behind(trouble, index, message)
            positions = np.flatnonzero(member.positions >= 0)
            verdicts.append(
                Verdict(
                    member.tensor,
                    member.dim,
                    positions,
                    extent=len(member.positions),
                    reason=f"cannot be cut: {message}{split}",
                    assumed=module != failed,
                )
            )
    return tuple(verdicts)


def _number_behind(trouble: Trouble, index: int, message: str) -> str:
    """Name the operator whose number keeps a group's channels, if the failure arose elsewhere and does not tell.

    It stands in the code; or it is the size of a part in a split, which no attribute holds, and the layer behind is
    given as many as ever.
    """
    graph = trouble.graph
    literal = literal_around(trouble.labeller, graph.unit_of_atom, graph.groups[index].units)
    if literal is not None:
        return literal.said_after(message)
    for parts in trouble.labeller.splits:
        units = [as_units(graph.unit_of_atom, part.atoms).reshape(-1) for part in parts]
        met = index in {number for part in units for number in graph.groups_in(part)}
        if met and trouble.failure.raised and parts[0].operator not in trouble.failure.message:
            return f"; {parts[0].where} divides them"
    return ""


def _verdicts_on_the_culprit(trouble: Trouble) -> tuple[Verdict, ...]:
    """Cut groups around the failed module one by one; return verdicts on the first that fails and those like it."""
    graph = trouble.graph
    found = _culprit(trouble)
    if found is None:
        return ()
    index, met_in, failure = found
    owner, member = _holder(graph, index, met_in)
    likes = {owner}
    if owner:
        likes |= kind_of(trouble.case.model, owner)[1]
    suffix = member.tensor.removeprefix(owner)
    positions = np.flatnonzero(member.positions >= 0)
    said = _in_words(trouble.case.model, failure)
    verdicts = []
    for like in sorted(likes):
        verdicts.append(
            Verdict(
                member.tensor if like in (owner, "") else like + suffix,
                member.dim,
                positions,
                extent=len(member.positions),
                reason=f"cannot be cut: {said}{_number_behind(trouble, index, said)}",
                assumed=like != owner,
            )
        )
    return tuple(verdicts)


def _in_words(model: nn.Module, failure: Failure) -> str:
    """Format a failure with a line of the network's own code; an exception names its line itself."""
    line = "" if failure.raised else line_around(model, failure.module)
    return f"{failure.message} ({line})" if line else failure.message


def _holder(graph: ChannelGraph, index: int, name: str) -> tuple[str, Member]:
    """Return the innermost module, from this one outwards, with a tensor of the group, and that member."""
    members = graph.members(index)
    for owner in and_around(name):
        inside = [member for member in members if owner and member.tensor.startswith(f"{owner}.")]
        if inside:
            return owner, inside[0]
    return "", members[0]


def _culprit(trouble: Trouble) -> tuple[int, str, Failure] | None:
    """Return the first group around the failed module that fails alone, where it was met, and its failure."""
    case, graph = trouble.case, trouble.graph
    for index, owner in _around(graph, trouble.failure.module)[:_MOST_SINGLE]:
        mask = random_mask(graph, [graph.groups[index]])
        failure = Trial(case.model, case.passes, graph, mask).failure()
        if failure is not None:
            return index, owner, failure
    return None


def _suspects(labeller: Labeller, graph: ChannelGraph, module: str) -> set[int]:
    """Return prunable groups that a module counts, or else reads; then the enclosing modules'; then its own."""
    for name in and_around(module):
        uses = [use.atoms for use in labeller.size_uses if use.module == name]
        counted = [as_units(graph.unit_of_atom, atoms).reshape(-1) for atoms in uses]
        read = [place.units for place in graph.places if place.module == name and place.kind == "input"]
        for vectors in (counted, read):
            groups = _prunable_in(graph, vectors)
            if groups:
                return groups
    own = [axis.units for axis in graph.axes if axis.tensor.rpartition(".")[0] == module]
    return _prunable_in(graph, own)


def _around(graph: ChannelGraph, failed: str) -> list[tuple[int, str]]:
    """Return the prunable groups in a module, then in the enclosing modules, each with the module where it was met."""
    found: dict[int, str] = {}
    for owner in and_around(failed):
        inside = [p.units for p in graph.places if not owner or f"{p.module}.".startswith(f"{owner}.")]
        for index in _by_locality(graph, _prunable_in(graph, inside)):
            found.setdefault(index, owner)
    return list(found.items())


def and_around(module: str) -> list[str]:
    """Return a module and all enclosing modules, innermost first."""
    names = [module]
    while names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names


def _prunable_in(graph: ChannelGraph, vectors: list[np.ndarray]) -> set[int]:
    groups = {index for units in vectors for index in graph.groups_in(units)}
    return {index for index in groups if graph.groups[index].prunable}


def _by_locality(graph: ChannelGraph, groups: set[int]) -> list[int]:
    """Sort groups, those that touch the fewest tensors first."""
    return sorted(groups, key=lambda index: (len(graph.members(index)), index))
