"""Builds a channel graph from recorded passes: labels, units, groups and their tensors. Runs no trials."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from image_classification.config import check_setting
from pruning.engine.case import Case
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.coupling import Coupling, as_layer, as_units, couple, literal_around
from pruning.engine.groups import AttributeAxis, Axis, Group, Layer, Place
from pruning.engine.kept_statistics import Statistics, family_of
from pruning.engine.labeller import Labeller, Policy, operation_name
from pruning.engine.labels import Slot, Value, compress, support
from pruning.engine.native_layers import tie_recurrent
from pruning.engine.operators import RULES
from pruning.engine.pairs import paired_attributes, tie_pairs
from pruning.engine.traces import Trace, TracedCall

_MOST_LABELLED = 4


def label(traces: Sequence[Trace], policy: Policy | None = None) -> Labeller:
    """Propagate labels through all traces."""
    labeller = Labeller(RULES, policy)
    for trace in traces:
        labeller.run(trace)
    return labeller


def label_case(case: Case, policy: Policy | None = None) -> Labeller:
    """Propagate labels through all traces of a network; submodules that are cut alike share labels.

    The labels of the latest policies are cached, since most graphs of a network differ only by later ties.
    """
    key = frozenset((policy or {}).items())
    if key not in case.labelled:
        labeller = label(case.traces, policy)
        tie_pairs(case.model, labeller, case.pairs)
        tie_recurrent(case.model, labeller)
        while len(case.labelled) >= _MOST_LABELLED:
            del case.labelled[next(iter(case.labelled))]
        case.labelled[key] = labeller
    return case.labelled[key].copy()


def build_graph(case: Case, labeller: Labeller | None = None) -> ChannelGraph:
    """Build the groups that label propagation united, without trials.

    Args:
        case: The network.
        labeller: Labels of its traces; by default they are propagated here.
    """
    modules, traces = case.modules, case.traces
    labeller = labeller or label_case(case)
    coupling = couple(labeller)
    places = _places(traces, labeller, coupling)
    graph = ChannelGraph(
        groups=_groups(coupling),
        axes=_axes(case, labeller, coupling),
        attributes=[*_group_counts(modules, labeller, coupling), *_bare_norms(modules, places)],
        places=places,
        layers=_layers(traces[0], labeller, coupling),
        constraints=case.constraints,
        statistics=_statistics(traces, labeller, coupling),
        unit_of_atom=coupling.unit_of_atom,
        choices={key: choice.chosen for key, choice in labeller.choices.items()},
        ungated=_ungated(labeller, coupling, places),
    )
    graph.attributes += paired_attributes(graph.attributes, case.pairs)
    graph.passes = tuple(case.passes)
    _annotate(modules, graph)
    _freeze_single_units(graph, labeller, coupling)
    _freeze_unread(graph, labeller, coupling)
    _apply_names(graph)
    return graph


def _layers(trace: Trace, labeller: Labeller, coupling: Coupling) -> list[Layer]:
    """Return the contractions with their costs per image; those of a second trace run in training only."""
    batch = trace.tensors[trace.inputs[0]].shape[0] if trace.inputs else 1
    layers = []
    for use in labeller.layers:
        layer = as_layer(coupling.unit_of_atom, use, batch)
        layer.training_only = use.trace > 0
        layers.append(layer)
    return layers


def _axes(case: Case, labeller: Labeller, coupling: Coupling) -> list[Axis]:
    """Return every dimension of every tensor that carries units, in the network's own order of tensors."""
    names = case.tensor_names
    weights = {use.weight for use in labeller.layers} & {name for name, _ in case.model.named_parameters()}
    axes = []
    order = {name: number for number, name in enumerate(names)}
    for name, dim in sorted(labeller.parameter_atoms, key=lambda key: (order[key[0]], key[1])):
        units = as_units(coupling.unit_of_atom, labeller.parameter_atoms[name, dim])
        if (units >= 0).any():
            owner = case.modules.get(name.rpartition(".")[0])
            transposed = bool(getattr(owner, "transposed", False))
            role = _role(dim, transposed) if name in weights else "along"
            axes.append(Axis(name, names[name], dim, units, role))
    return axes


def _role(dim: int, transposed: bool) -> str:
    """Return the role of a dimension of a weight (out, in, …), or (in, out, …) for a transposed convolution."""
    if dim > 1:
        return "along"
    return "out" if (dim == 1) == transposed else "in"


def _group_counts(
    modules: Mapping[str, nn.Module], labeller: Labeller, coupling: Coupling
) -> list[AttributeAxis]:
    """Return `groups` and `num_groups` of the modules that hold them."""
    found: dict[tuple[str, str], AttributeAxis] = {}
    for module, attribute, atoms in labeller.group_counts:
        units = as_units(coupling.unit_of_atom, atoms)
        if getattr(modules[module], attribute, None) == units.size and (units >= 0).any():
            found.setdefault((module, attribute), AttributeAxis(module, attribute, None, units))
    return list(found.values())


def _bare_norms(modules: Mapping[str, nn.Module], places: list[Place]) -> list[AttributeAxis]:
    """Return `num_features` and `normalized_shape` of normalisations without tensors, whose widths no tensor shows."""
    found: dict[tuple[str, int | None], AttributeAxis] = {}
    for place in places:
        module = modules[place.module]
        if not isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm)):
            continue
        if place.kind != "output" or [*module.parameters(), *module.buffers()]:
            continue
        attribute = ""
        item = None
        width = 0
        if isinstance(module, nn.modules.batchnorm._NormBase):
            attribute = "num_features"
            width = module.num_features
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            item = place.dim - len(place.shape) + len(module.normalized_shape)
            attribute = "normalized_shape"
            width = module.normalized_shape[item] if item >= 0 else 0
        if attribute and width == place.units.size:
            axis = AttributeAxis(place.module, attribute, item, place.units)
            found.setdefault((place.module, item), axis)
    return list(found.values())


def _places(traces: list[Trace], labeller: Labeller, coupling: Coupling) -> list[Place]:
    """Return the first inputs and outputs of module calls that carry units; of the training pass only new ones."""
    places: list[Place] = []
    consumers = {(use.trace, use.module) for use in labeller.layers if use.consumed is not None}
    for number, trace in enumerate(traces):
        seen_before = {(place.module, place.call, place.kind) for place in places}
        for call in trace.calls:
            for kind, values in (("input", call.inputs[:1]), ("output", call.outputs[:1])):
                if not values or (call.module, call.call, kind) in seen_before:
                    continue
                value = labeller.values[number][values[0]]
                if value is None:
                    continue
                consumer = kind == "input" and call.is_leaf and (number, call.module) in consumers
                for slot in value.slots:
                    place = _place(call, kind, value, slot, coupling, consumer)
                    if place is not None:
                        places.append(place)
    return places


def _place(
    call: TracedCall, kind: str, value: Value, slot: Slot, coupling: Coupling, consumer: bool
) -> Place | None:
    units = compress(as_units(coupling.unit_of_atom, slot))
    dims = support(units)
    if len(dims) != 1 or units.max() < 0:
        return None
    return Place(
        call.module, kind, call.call, dims[0], units.reshape(-1), value.shape, consumer, call.is_leaf
    )


def _groups(coupling: Coupling) -> list[Group]:
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for index, (name, units, reason) in enumerate(coupling.groups):
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        groups.append(Group(index, name, units, not reason, reason, original_width=len(units)))
    return groups


def _statistics(traces: list[Trace], labeller: Labeller, coupling: Coupling) -> list[Statistics]:
    places = [_statistics_places(trace) for trace in traces]
    found = []
    for use in labeller.statistics:
        units = compress(as_units(coupling.unit_of_atom, use.slot))
        dims = support(units)
        if len(dims) == 1 and units.max() >= 0:
            place = places[use.trace][use.operation]
            found.append(
                Statistics(
                    trace=use.trace,
                    ordinal=place.ordinal,
                    module=use.module,
                    operator=use.operator,
                    dim=dims[0],
                    rank=units.ndim,
                    units=units.reshape(-1),
                    line=place.line,
                    times=place.times,
                    order=place.order,
                )
            )
    return found


@dataclasses.dataclass(frozen=True)
class _StatisticsPlace:
    """Where a pass runs an operator that takes statistics: the fields of `Statistics` of these names."""

    family: str
    line: str
    ordinal: int
    times: int
    order: int


def _statistics_places(trace: Trace) -> dict[int, _StatisticsPlace]:
    """Map the index of every operator that takes statistics to its place in the pass."""
    counts: Counter[tuple[str, str]] = Counter()  # by family and line; "" counts the whole pass
    seen: dict[int, tuple[str, str, int, int]] = {}
    for operation in trace.operations:
        family = family_of(operation_name(operation.func))
        if family is not None:
            ordinal, order = counts[family, operation.line], counts[family, ""]
            seen[operation.index] = (family, operation.line, ordinal, order)
            for line in {"", operation.line}:
                counts[family, line] += 1
    return {
        index: _StatisticsPlace(family, line, ordinal, counts[family, line] if line else 0, order)
        for index, (family, line, ordinal, order) in seen.items()
    }


def located(statistics: Iterable[Statistics], traces: Sequence[Trace]) -> list[Statistics]:
    """Find the lines of statistics from a checkpoint in the passes of the network as its code is now."""
    places = [
        {(place.family, place.order): place for place in _statistics_places(trace).values()}
        for trace in traces
    ]
    found = []
    for use in statistics:
        known = places[use.trace] if use.trace < len(places) else {}
        place = known.get((family_of(use.operator) or "", use.ordinal))
        if place is not None and not use.line:
            use = dataclasses.replace(
                use, ordinal=place.ordinal, line=place.line, times=place.times, order=place.order
            )
        found.append(use)
    return found


def _ungated(labeller: Labeller, coupling: Coupling, places: list[Place]) -> np.ndarray:
    """Find the units that an operator of the evaluation pass reads other than at a layer's input, where the gates are.

    Statistics over channels count only if no layer reads the channels too.
    """
    count = int(coupling.unit_of_atom.max(initial=-1)) + 1
    nothing = np.zeros(count + 1, dtype=bool)

    def members(units: np.ndarray) -> np.ndarray:
        """Return which unit ids occur, (units + 1,) bool. Positions without a unit, -1, set the last entry."""
        mask = nothing.copy()
        mask[units.reshape(-1)] = True
        return mask

    # covered: the units at the input of every layer, by module. read: the units that any layer reads.
    covered: dict[str, np.ndarray] = {}
    for place in places:
        if place.kind == "input" and place.consumer:
            covered[place.module] = covered.get(place.module, nothing) | members(place.units)
    found = nothing.copy()
    read = nothing.copy()
    for seen in covered.values():
        read |= seen
    # An operator that consumes channels which are not at the input of its own module reads them past the gates.
    for trace, module, atoms in labeller.consumptions:
        if trace == 0:
            found |= members(as_units(coupling.unit_of_atom, atoms)) & ~covered.get(module, nothing)
    read |= found
    for use in labeller.statistics:
        if use.trace == 0:
            found |= members(as_units(coupling.unit_of_atom, use.slot)) & ~read
    return np.flatnonzero(found[:-1])


def _annotate(modules: Mapping[str, nn.Module], graph: ChannelGraph) -> None:
    """Add kinds of layers, channels per unit and notes on statistics."""
    notes: dict[int, set[str]] = {}
    for use in graph.statistics:
        for index in graph.groups_in(use.units):
            notes.setdefault(index, set()).add(
                f"statistics of {use.module!r} are taken over the kept channels"
            )
    for group in graph.groups:
        members = graph.members(group)
        kinds = {type(modules[m.tensor.rpartition(".")[0]]).__name__ for m in members}
        name = group.name.partition("#")[0]
        if not members:  # repetitions that a reshape ran together with channels: the batch, most often
            group.prunable, group.reason = False, group.reason or "no tensor of the network holds it"
            continue
        outs = [m for m in members if m.role == "out"]
        first = [m for m in outs if m.tensor.startswith(f"{name}.")] or outs or members
        group.kinds = tuple(sorted(kinds))
        group.channels_per_unit = max(1, int((first[0].positions >= 0).sum()) // max(1, group.width))
        group.notes = tuple(sorted(notes.get(group.index, ())))


def _freeze_single_units(graph: ChannelGraph, labeller: Labeller, coupling: Coupling) -> None:
    """Freeze groups of one unit, which cannot go, and say what tied their channels together."""
    for group in graph.groups:
        if not group.prunable or group.width > 1:
            continue
        group.prunable = False
        by = labeller.tied_by(np.flatnonzero(coupling.unit_of_atom == group.units[0]))
        group.reason = (
            f"all its channels are tied together{f' by {by}' if by else ''}: they can only go at once"
        )
        literal = literal_around(labeller, coupling.unit_of_atom, group.units)
        group.reason += "" if literal is None else literal.said_after(group.reason)


def _freeze_unread(graph: ChannelGraph, labeller: Labeller, coupling: Coupling) -> None:
    """Freeze layers of which no pass reads any output: a loss outside of the network does, if it is kept somewhere."""
    uses = [atoms for _, _, atoms in labeller.consumptions]
    uses += [use.consumed for use in labeller.layers if use.consumed is not None]
    uses += [use.slot for use in labeller.statistics]
    read = np.zeros(int(coupling.unit_of_atom.max(initial=-1)) + 2, dtype=bool)
    for atoms in uses:
        read[as_units(coupling.unit_of_atom, atoms).reshape(-1)] = True
    read[-1] = True  # of channels without a unit nothing is known
    for axis in graph.axes:
        if axis.role == "out" and not read[axis.units].any():
            for index in graph.groups_in(axis.units):
                group = graph.groups[index]
                if group.prunable:
                    group.prunable = False
                    group.reason = "nothing in `forward` reads it: what does may be outside"


def _apply_names(graph: ChannelGraph) -> None:
    """Freeze the ignored modules' groups, and check that every pattern matches something."""
    for pattern in graph.constraints.ignored:
        groups = graph.matching(pattern)
        check_setting(bool(groups), "ignored", pattern, "no prunable layer has such a name")
        graph.freeze(groups, f"ignored, as asked for ({pattern})")
    for pattern, least in graph.constraints.limits.items():
        known = bool(graph.matching(pattern))
        check_setting(known, "limits", f"{pattern}={least:g}", "no prunable layer has such a name")
