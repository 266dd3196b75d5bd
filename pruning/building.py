"""From recorded passes to a channel graph: labels, units, groups and what carries them. Nothing is tried out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from torch import nn

from pruning.channel_graph import ChannelGraph, Constraints
from pruning.groups import AttributeAxis, Axis, Coupling, Group, Layer, Place, as_layer, as_units, couple
from pruning.labelling import Labeller, Policy, operation_name
from pruning.labels import compress, support
from pruning.operators import RULES
from pruning.statistics import Statistics, family_of
from pruning.tracing import Trace, named_tensors, record, tensor_names


def record_all(model: nn.Module, images: tuple[Any, ...]) -> list[Trace]:
    """The evaluation pass, and the training pass where that takes parameters which evaluation does not."""
    traces = [record(model, images)]
    used = traces[0].used_names
    idle = [name for name, _ in model.named_parameters() if name not in used]
    if idle:
        try:
            training = record(model, images, training=True)
        except (RuntimeError, ValueError, AssertionError):
            return traces  # the training path does not run on these images: its parameters stay frozen
        if training.used_names - used:
            traces.append(training)
    return traces


def label(traces: list[Trace], policy: Policy | None = None) -> Labeller:
    """Propagate labels through all traces."""
    labeller = Labeller(RULES, policy)
    for trace in traces:
        labeller.run(trace)
    return labeller


def build_graph(
    model: nn.Module,
    traces: list[Trace],
    constraints: Constraints,
    labeller: Labeller | None = None,
) -> ChannelGraph:
    """Group what label propagation united; nothing is tried out."""
    labeller = labeller or label(traces)
    coupling = couple(labeller)
    names = tensor_names(model)
    axes = _axes(model, labeller, coupling, names)
    attributes = _group_counts(model, labeller, coupling)
    places = _places(traces, labeller, coupling)
    attributes += _bare_norms(model, places)
    batch = traces[0].tensors[traces[0].inputs[0]].shape[0] if traces[0].inputs else 1
    layers = [as_layer(coupling.unit_of_atom, use, batch) for use in labeller.layers]
    _mark_training_only(layers, labeller)
    groups = _groups(coupling)
    statistics = _statistics(traces, labeller, coupling)
    graph = ChannelGraph(
        groups, axes, attributes, places, layers, constraints, statistics, coupling.unit_of_atom,
        {key: choice.chosen for key, choice in labeller.choices.items()}, _ungated(labeller, coupling, places),
    )  # fmt: skip
    _annotate(model, graph)
    _apply_names(graph)
    return graph


def _mark_training_only(layers: list[Layer], labeller: Labeller) -> None:
    for layer, use in zip(layers, labeller.layers, strict=True):
        layer.training_only = use.trace > 0


def _axes(
    model: nn.Module, labeller: Labeller, coupling: Coupling, names: dict[str, tuple[str, ...]]
) -> list[Axis]:
    weights = {use.weight for use in labeller.layers} & {name for name, _ in model.named_parameters()}
    modules = dict(model.named_modules())
    axes = []
    order = {name: number for number, name in enumerate(named_tensors(model))}
    for name, dim in sorted(labeller.parameter_atoms, key=lambda key: (order[key[0]], key[1])):
        units = as_units(coupling.unit_of_atom, labeller.parameter_atoms[name, dim])
        if (units >= 0).any():
            owner = modules.get(name.rpartition(".")[0])
            transposed = bool(getattr(owner, "transposed", False))
            role = "along" if name not in weights or dim > 1 else "out" if (dim == 1) == transposed else "in"
            axes.append(Axis(name, names[name], dim, units, role))
    return axes


def _group_counts(model: nn.Module, labeller: Labeller, coupling: Coupling) -> list[AttributeAxis]:
    """`groups` and `num_groups` of the modules that hold them."""
    modules = dict(model.named_modules())
    found: dict[tuple[str, str], AttributeAxis] = {}
    for module, attribute, atoms in labeller.group_counts:
        units = as_units(coupling.unit_of_atom, atoms)
        if getattr(modules[module], attribute, None) == units.size and (units >= 0).any():
            found.setdefault((module, attribute), AttributeAxis(module, attribute, None, units))
    return list(found.values())


def _bare_norms(model: nn.Module, places: list[Place]) -> list[AttributeAxis]:
    """`num_features` of normalisations without tensors, which tensors cannot tell."""
    modules = dict(model.named_modules())
    found: dict[str, AttributeAxis] = {}
    for place in places:
        module = modules[place.module]
        bare = isinstance(module, nn.modules.batchnorm._NormBase) and not [
            *module.parameters(),
            *module.buffers(),
        ]
        if bare and place.kind == "output" and module.num_features == place.units.size:
            found.setdefault(place.module, AttributeAxis(place.module, "num_features", None, place.units))
    return list(found.values())


def _places(traces: list[Trace], labeller: Labeller, coupling: Coupling) -> list[Place]:
    places: list[Place] = []
    consumers = {(use.trace, use.module) for use in labeller.layers if use.consumed is not None}
    for number, trace in enumerate(traces):
        seen_before = {(p.module, p.call, p.kind) for p in places}
        for call in trace.calls:
            for kind, values in (("input", call.inputs[:1]), ("output", call.outputs[:1])):
                if not values or (call.module, call.call, kind) in seen_before:
                    continue
                value = labeller.values[number][values[0]]
                for slot in value.slots if value is not None else ():
                    consumer = kind == "input" and call.is_leaf and (number, call.module) in consumers
                    place = _place(call, kind, value, slot, coupling, consumer)
                    places += [place] if place is not None else []
    return places


def _place(
    call: Any, kind: str, value: Any, slot: np.ndarray, coupling: Coupling, consumer: bool
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
    ordinals = [_ordinals(trace) for trace in traces]
    found = []
    for use in labeller.statistics:
        units = compress(as_units(coupling.unit_of_atom, use.slot))
        for dim in support(units):
            if len(support(units)) == 1 and units.max() >= 0:
                ordinal = ordinals[use.trace][use.operation]
                found.append(
                    Statistics(
                        use.trace, ordinal, use.module, use.operator, dim, units.ndim, units.reshape(-1)
                    )
                )
    return found


def _ordinals(trace: Trace) -> dict[int, int]:
    """Index of every operator that takes statistics to its position within its family."""
    counts: Counter[str] = Counter()
    found = {}
    for operation in trace.operations:
        family = family_of(operation_name(operation.func))
        if family is not None:
            found[operation.index] = counts[family]
            counts[family] += 1
    return found


def _ungated(labeller: Labeller, coupling: Coupling, places: list[Place]) -> np.ndarray:
    """Units that end in an operator of the evaluation pass which is no layer of its own.

    Statistics over channels count where no layer reads the channels as well.
    """
    count = int(coupling.unit_of_atom.max(initial=-1)) + 1

    def members(units: np.ndarray) -> np.ndarray:
        mask = np.zeros(count + 1, dtype=bool)
        mask[units.reshape(-1)] = True  # -1, no unit, is the last
        return mask

    nothing = np.zeros(count + 1, dtype=bool)
    covered: dict[str, np.ndarray] = {}
    for place in places:
        if place.kind == "input" and place.consumer:
            covered[place.module] = covered.get(place.module, nothing) | members(place.units)
    found, read = nothing.copy(), nothing.copy()
    for seen in covered.values():
        read |= seen
    for trace, module, atoms in labeller.consumptions:
        if trace == 0:
            found |= members(as_units(coupling.unit_of_atom, atoms)) & ~covered.get(module, nothing)
    read |= found
    for use in labeller.statistics:
        if use.trace == 0:
            found |= members(as_units(coupling.unit_of_atom, use.slot)) & ~read
    return np.flatnonzero(found[:-1])


def _annotate(model: nn.Module, graph: ChannelGraph) -> None:
    """Kinds of layers, channels per unit, notes on statistics, and single units that cannot leave."""
    modules = dict(model.named_modules())
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
        outs = [m for m in members if m.role == "out"]
        first = [m for m in outs if m.tensor.startswith(f"{name}.")] or outs or members
        group.kinds = tuple(sorted(kinds))
        group.channels_per_unit = max(1, int((first[0].positions >= 0).sum()) // max(1, group.width))
        group.notes = tuple(sorted(notes.get(group.index, ())))
        if group.prunable and group.width < 2:
            group.prunable = False
            group.reason = "all its channels are tied together: they can only go at once"


def _apply_names(graph: ChannelGraph) -> None:
    """Freeze what is to be ignored, and make sure that every pattern names something."""
    for pattern in graph.constraints.ignored:
        groups = graph.matching(pattern)
        if not groups:
            raise ValueError(f"--prune-ignore {pattern}: no prunable layer has such a name")
        graph.freeze(groups, f"ignored, as asked for ({pattern})")
    for pattern, least in graph.constraints.limits.items():
        if not graph.matching(pattern):
            raise ValueError(f"--prune-limit {pattern}={least:g}: no prunable layer has such a name")
