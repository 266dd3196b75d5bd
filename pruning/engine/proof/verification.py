"""Tries every group before it is called prunable: the rewritten network must equal the masked one.

All groups are cut at once, by random halves (`trial.py`). Where that fails, the first module that raises or differs
tells whose groups to look at, and a remedy is taken (`remedies.py`). So a few forward passes try everything. Once
nothing fails, every remedy must show that it is needed: the graph is built without it, and if nothing fails then
either, it is taken back.

Until then one cut speaks for all, and a pass that repeats another operator by operator is left out; what is found in
the end stands every cut in every pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from pruning.engine.building import build_graph, label_case
from pruning.engine.case import Case
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import AttributeAxis
from pruning.engine.labeller import Labeller
from pruning.engine.pairs import paired_attributes
from pruning.engine.proof.agreement_of_runs import Failure
from pruning.engine.proof.hidden_widths import hidden_widths, public, tie_shapes, tie_widths
from pruning.engine.proof.loosening import freedom, loosened
from pruning.engine.proof.rehearsal import rehearsal
from pruning.engine.proof.remedies import Measures, and_around, kind_of, remedied
from pruning.engine.proof.trial import Trials
from pruning.engine.proof.trial_masks import MASKS

_MOST_ROUNDS = 60


def verified_graph(case: Case, choices: Mapping[str, str] | None = None) -> ChannelGraph:
    """Build the graph and try it until nothing fails. Call inside `undisturbed`.

    Args:
        case: The network.
        choices: Couplings to take over; without them the better ones are looked for.
    """
    measures = Measures(dict(choices), given=True) if choices else Measures(loosened(case))
    with rehearsal(case.model, case.passes):
        graph, before_shapes = _verified(case, measures)
        if before_shapes is None:
            return graph
        # Widths that happen to be equal may have been tied as well: freezing can leave more.
        apart = dataclasses.replace(before_shapes, ties_shapes=False)
        without, _ = _verified(case, apart, more_than=_removable(graph))
    return graph if _removable(graph) >= _removable(without) else without


def _removable(graph: ChannelGraph) -> int:
    """Return the number of channels that could be removed."""
    return sum((group.width - 1) * group.channels_per_unit for group in graph.prunable)


def _verified(case: Case, measures: Measures, more_than: int = 0) -> tuple[ChannelGraph, Measures | None]:
    """Take measures until nothing fails.

    Args:
        case: The network.
        measures: Those to begin with.
        more_than: Give up once no more channels than this could be removed.

    Returns:
        The graph with which nothing fails; the last one if it was given up. Also the measures taken before the first
        tie of widths that may have been computed from each other; None if no such tie remained.
    """
    before_shapes = None
    has_differed = False
    for _ in range(_MOST_ROUNDS):
        labeller, graph = _build(case, measures)
        trials = _trials(case, graph)
        # Asked before a trial is run to its end.
        if more_than and not _may_remove(case, measures, trials, more_than):
            return graph, None
        failure = trials.first.failure(repeats=False) if has_differed else trials.first.exception()
        if failure is None:
            trials, failure = _without_needless(case, measures, trials)
            has_differed = failure is not None
        if failure is None:
            return trials.graph, before_shapes if measures.shaped else None
        changed = remedied(case, measures, labeller, graph, failure)
        if changed.shaped and before_shapes is None:
            before_shapes = measures
        measures = changed
        sure = measures.without_assumptions()
        if more_than and sure.verdicts:  # channels were frozen for good
            _, graph = _build(case, sure)
            if _removable(graph) <= more_than:
                return graph, None
    _, graph = _build(case, measures)
    failure = _trials(case, graph).failure()
    if failure is not None:
        graph.freeze(graph.prunable, f"could not be verified: {failure.message}")
    return graph, before_shapes if measures.shaped else None


def _may_remove(case: Case, measures: Measures, trials: Trials, more_than: int) -> bool:
    """Whether more channels than these could be removed, now or once needless measures are dropped.

    Most that could not are told by exceptions in a single cut; only the others are judged by all cuts.
    """
    if _removable(trials.graph) > more_than:
        return True
    return all(
        _removable(_without_needless_measures(case, measures, trials, judge).graph) > more_than
        for judge in (_may_hold, _holds)
    )


def _without_needless(case: Case, measures: Measures, trials: Trials) -> tuple[Trials, Failure | None]:
    """Drop measures and numbers that the graph does not need; return its trials, and what fails under all cuts.

    A measure is taken back if the first cut stands without it, which all cuts must stand in the end. If they do not,
    each measure is judged again, by all cuts. Only where no measure is needless, the graph with all of them is compared
    with the masked network; before, it is enough that it runs.
    """
    bold = _without_needless_measures(case, measures, trials, _seems_to_hold)
    failure = trials.first.failure(repeats=False) if bold is trials else None
    if failure is not None:
        return trials, failure
    failure = _failure_without_needless_numbers(case, bold)
    if failure is None or bold is trials:
        return bold, failure
    failure = trials.first.failure(repeats=False)
    if failure is not None:
        return trials, failure
    sure = _without_needless_measures(case, measures, trials, _holds)
    return sure, _failure_without_needless_numbers(case, sure)


def _trials(case: Case, graph: ChannelGraph) -> Trials:
    """Return the trials of the cuts that every graph must stand."""
    return Trials(case.model, case.passes, graph, [(mask(graph), repeats) for mask, repeats in MASKS])


def _build(case: Case, measures: Measures) -> tuple[Labeller, ChannelGraph]:
    """Build labels and graph with all measures taken."""
    labeller = label_case(case, measures.policy)
    for verdict in measures.verdicts:
        atoms = labeller.parameter_atoms.get((verdict.tensor, verdict.dim))
        if atoms is not None:
            labeller.table.freeze(verdict.of(atoms), verdict.reason)
    tie_widths(case.model, labeller, measures.tied)
    for modules, ties in measures.shaped:
        tie_shapes(case, labeller, modules, ties)
    graph = build_graph(case, labeller)
    if measures.follows:
        unfollowed = measures.unfollowed
        known = {(axis.module, axis.attribute, axis.item) for axis in graph.attributes}
        for axis in hidden_widths(case.model, labeller, graph):
            if axis.module not in unfollowed and (axis.module, axis.attribute, axis.item) not in known:
                graph.attributes.append(axis)
        graph.attributes += paired_attributes(graph.attributes, case.pairs)
    return labeller, graph


def _without_needless_measures(
    case: Case, measures: Measures, trials: Trials, holds: Callable[[Trials], bool]
) -> Trials:
    """Drop measures that the graph does not need: first all assumed verdicts, then measures one by one.

    That whole numbers follow widths is judged number by number, in `_failure_without_needless_numbers`.

    Args:
        case: The network.
        measures: All that were taken.
        trials: Of the graph with all of them.
        holds: Judges the trials of a graph with fewer measures.

    Returns:
        Trials of the graph with the measures that are needed.
    """
    if any(verdict.assumed for verdict in measures.verdicts):
        sure = measures.without_assumptions()
        bolder = _trials(case, _build(case, sure)[1])
        if holds(bolder):
            measures, trials = sure, bolder
    for take_back in _takings_back(measures):
        fewer = take_back(measures)
        if fewer.is_as(measures):
            continue
        bolder = _trials(case, _build(case, fewer)[1])
        if bolder.graph.cuts_like(trials.graph):
            measures = fewer
        elif freedom(bolder.graph) >= freedom(trials.graph) and holds(bolder):
            measures, trials = fewer, bolder
    return trials


def _takings_back(measures: Measures) -> list[Callable[[Measures], Measures]]:
    """Return functions that each drop one measure, or the ties of one number (it may equal a width by chance)."""
    single = [measure for measure in measures.taken if not measure.follows]
    names = sorted({name for _, name in measures.tied})
    return [
        *(functools.partial(Measures.without, measures=[measure]) for measure in single),
        *(functools.partial(Measures.untied, attribute=name) for name in names),
    ]


def _may_hold(trials: Trials) -> bool:
    """Whether nothing raises in the first cut."""
    return trials.first.exception() is None


def _seems_to_hold(trials: Trials) -> bool:
    """Whether nothing fails in the first cut, and nothing raises in any."""
    # Exceptions are found without the masked network.
    return not trials.raises() and trials.first.failure(repeats=False) is None


def _holds(trials: Trials) -> bool:
    """Whether nothing fails in all cuts."""
    return _seems_to_hold(trials) and trials.failure() is None


def _failure_without_needless_numbers(case: Case, trials: Trials) -> Failure | None:
    """Keep integer attributes unchanged that nothing counts by, or that equal a width by chance; return what then
    fails.

    Each number is judged by two cuts, and the result by all cuts. If those fail, each number is judged again by all
    cuts, unless they fail with all numbers following too: that is the failure returned.
    """
    graph = trials.graph
    followed = graph.attributes

    def stands_one() -> bool:
        # A view by the old width can succeed by luck, if what stays divides well; in the second cut it does not.
        return trials.first.failure(repeats=False) is None and trials.second.exception() is None

    def stands_all() -> bool:
        return stands_one() and trials.failure() is None

    _drop_needless(case, trials, stands_one)
    failure = trials.failure()
    if failure is None or graph.attributes is followed:
        return failure
    graph.attributes = followed
    failure = trials.failure()
    if failure is None:
        _drop_needless(case, trials, stands_all)
    return failure


def _drop_needless(case: Case, trials: Trials, stands: Callable[[], bool]) -> None:
    """Keep numbers unchanged if the graph passes without them following.

    At first no number follows. The module in which that fails tells the kind of modules whose numbers are needed, and
    so on until nothing fails; then the numbers of each of these kinds are judged one by one. What belongs to frozen
    groups never changes and is not judged.
    """
    graph = trials.graph
    followed = graph.attributes
    found = _numbers_by_kind(case, graph)
    kinds = set(found)
    while kinds:
        numbers = [axis for kind in kinds for axes in found[kind].values() for axis in axes]
        graph.attributes = _all_but(followed, numbers)
        failure = trials.first.failure(repeats=False)
        if failure is None:
            break
        blamed = [kind for kind in _kinds_around(case, failure.module) if kind in kinds]
        kinds -= set(blamed[:1]) or kinds  # nothing to put it down to: all are judged one by one
    if not kinds or not stands():
        graph.attributes = followed
        kinds = set()
    for kind in sorted(set(found) - kinds):
        for axes in found[kind].values():
            before = graph.attributes
            graph.attributes = _all_but(before, axes)
            if not stands():
                graph.attributes = before


def _numbers_by_kind(case: Case, graph: ChannelGraph) -> dict[str, dict[str, list[AttributeAxis]]]:
    """Return kind of modules → name → the numbers that were found to equal a width that may change."""
    found: dict[str, dict[str, list[AttributeAxis]]] = {}
    for axis in graph.attributes:
        may_change = any(graph.groups[index].prunable for index in graph.groups_in(axis.units))
        if axis.found and may_change:
            kind, _ = kind_of(case.model, axis.module)
            found.setdefault(kind, {}).setdefault(public(axis.attribute), []).append(axis)
    return found


def _kinds_around(case: Case, module: str) -> list[str]:
    """Return the kinds of a module and of the enclosing modules, innermost first."""
    return [kind_of(case.model, name)[0] for name in and_around(module)]


def _all_but(axes: list[AttributeAxis], others: list[AttributeAxis]) -> list[AttributeAxis]:
    gone = {id(axis) for axis in others}
    return [axis for axis in axes if id(axis) not in gone]
