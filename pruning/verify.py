"""Tries every group before it is called prunable: the rewritten network must equal the masked one.

Masked means: all slices that carry removed units are zeroed in the full network, and statistics over channels
(LayerNorm, some GroupNorms, weight standardisation) are taken over the kept channels: what a network does that
never had the others. All groups are cut at once, by random halves; where that fails, the first module that
raises or differs tells whose groups to look at, and these are coupled in another way, given hidden widths
(whole numbers that modules hold), or frozen with the reason. So a few forward passes try everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from pruning.building import build_graph, label
from pruning.channel_graph import ChannelGraph, Constraints
from pruning.groups import AttributeAxis, Place, as_units, vector_of
from pruning.labelling import Labeller, Policy
from pruning.rehearsal import as_float, masked, rehearsal
from pruning.surgery import Changes, plan_network
from pruning.tracing import Trace, as_tree, is_leaf, set_trace_mode

TOLERANCE = 1e-4
_MODULE_TOLERANCE = 1e-3
_MOST_ROUNDS = 60
_MOST_TIED, _MOST_ATTEMPTS = 8, 6
_FLIPPED = {
    "even": "free",
    "free": "even",
    "dims": "heads",
    "heads": "dims",
    "blocks": "positions",
    "positions": "blocks",
}
_BLOCKWISE = frozenset({"blocks", "positions", "heads"})
_SPATIAL_NAMES = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding"})


@dataclasses.dataclass
class Verdict:
    """Slices of a tensor that must stay, found by trial (or assumed, as in a module of the same kind)."""

    tensor: str
    dim: int
    positions: np.ndarray
    reason: str
    assumed: bool


@dataclasses.dataclass
class Failure:
    """Where a trial failed: the innermost module, and what happened."""

    module: str
    message: str


@dataclasses.dataclass
class _State:
    """What has been learned so far.

    `remedies` holds, per kind of module, what was tried; `messages` what failed first.
    """

    policy: Policy = dataclasses.field(default_factory=dict)
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    use_attributes: bool = False
    barred_attributes: set[str] = dataclasses.field(default_factory=set)
    flipped: set[str] = dataclasses.field(default_factory=set)
    remedies: dict[str, int] = dataclasses.field(default_factory=dict)
    messages: dict[str, str] = dataclasses.field(default_factory=dict)


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
    with rehearsal(model, images):
        for _ in range(_MOST_ROUNDS):
            labeller, graph = _build(model, traces, constraints, state)
            failure = first_failure(model, images, traces, graph)
            if failure is None:
                return _without_assumptions(model, images, traces, constraints, state, graph)
            _learn(model, state, labeller, graph, failure)
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
            labeller.table.freeze(atoms[verdict.positions], verdict.reason)
    graph = build_graph(model, traces, constraints, labeller)
    if state.use_attributes:
        known = {(a.module, a.attribute, a.item) for a in graph.attributes}
        for attribute in attribute_candidates(model, labeller, graph):
            key = (attribute.module, attribute.attribute, attribute.item)
            if attribute.module not in state.barred_attributes and key not in known:
                graph.attributes.append(attribute)
    return labeller, graph


def loosened(model: nn.Module, traces: list[Trace], constraints: Constraints) -> Policy:
    """Other couplings for operators that tie all their channels together, where that frees some."""
    labeller = label(traces)
    graph = build_graph(model, traces, constraints, labeller)
    policy: Policy = {}
    best = _freedom(graph)
    tied = [group for group in graph.groups if group.width == 1 and group.channels_per_unit > 1]
    for group in tied[:_MOST_TIED]:
        touching = {
            key: choice
            for key, choice in labeller.choices.items()
            if choice.chosen in _BLOCKWISE
            and group.index in graph.groups_in(as_units(graph.unit_of_atom, choice.atoms).reshape(-1))
        }
        attempts = [{key: _FLIPPED[choice.chosen]} for key, choice in touching.items()]
        if len(touching) > 1:
            attempts.append({key: _FLIPPED[choice.chosen] for key, choice in touching.items()})
        for attempt in attempts[:_MOST_ATTEMPTS]:
            candidate = {**policy, **attempt}
            freedom = _freedom(build_graph(model, traces, constraints, label(traces, candidate)))
            if freedom > best:
                best, policy = freedom, candidate
    return policy


def _freedom(graph: ChannelGraph) -> int:
    return sum(group.width - 1 for group in graph.prunable)


# -- learning from a failure -------------------------------------------------------------------------------


def _learn(
    model: nn.Module, state: _State, labeller: Labeller, graph: ChannelGraph, failure: Failure
) -> None:
    """Change one thing: hidden widths, another coupling, no hidden widths here, or frozen groups."""
    if not state.use_attributes:
        state.use_attributes = True
        return
    kind, siblings = _siblings(model, failure.module)
    state.messages.setdefault(kind, failure.message)
    own = {a.module for a in graph.attributes if a.found} & siblings
    while True:
        step = state.remedies.get(kind, 0)
        state.remedies[kind] = step + 1
        hopeless = isinstance(model.get_submodule(failure.module), nn.MultiheadAttention)
        if step == 0 and not hopeless and _flip(state, labeller, siblings):
            return
        if step == 1 and own - state.barred_attributes:
            state.barred_attributes |= own
            return
        if step == 2 and _unflip(state, labeller, siblings):  # neither helped: back to the first coupling
            state.barred_attributes -= siblings
            return
        if step > 2:
            _freeze(state, labeller, graph, failure.module, siblings, state.messages[kind])
            return


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
        state.verdicts.append(Verdict(member.tensor, member.dim, positions, reason, module != failed))


def attribute_candidates(model: nn.Module, labeller: Labeller, graph: ChannelGraph) -> list[AttributeAxis]:
    """Whole numbers of modules that equal a width which an operator inside that module was given.

    Where several numbers of a module equal several such widths (channels of padding before and behind), they
    are matched in order: of definition here, of use there.
    """
    modules = dict(model.named_modules())
    widths: dict[tuple[str, int], dict[tuple[int, ...], np.ndarray]] = {}
    for use in labeller.size_uses:
        units = vector_of(graph.unit_of_atom, use)
        if units is not None and units.size and units.max() >= 0:
            same = widths.setdefault((use.module, units.size), {})
            same.setdefault(tuple(np.sort(units).tolist()), units)
    found = []
    for (name, size), same in widths.items():
        numbers = [(attribute, item) for attribute, item, value in _integers(modules[name]) if value == size]
        vectors = list(same.values())
        for position, (attribute, item) in enumerate(numbers):
            units = vectors[min(position, len(vectors) - 1)]
            found.append(AttributeAxis(name, attribute, item, units, found=True))
    return found


def _integers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    if type(module).__module__.startswith("torch.nn") and not isinstance(
        module, (nn.Unflatten, nn.ChannelShuffle)
    ):
        return
    for name, value in vars(module).items():
        if name in _SPATIAL_NAMES:
            continue
        if type(value) is int:
            yield name, None, value
        elif type(value) in (list, tuple) and value and all(type(item) is int for item in value):
            yield from ((name, position, item) for position, item in enumerate(value))


# -- one trial ---------------------------------------------------------------------------------------------


def first_failure(
    model: nn.Module, images: tuple[Any, ...], traces: list[Trace], graph: ChannelGraph
) -> Failure | None:
    """Cut all prunable groups by random halves and compare with the masked network."""
    mask = _random_mask(graph)
    if mask.all():
        return None
    images = as_float(images)
    for number, trace in enumerate(traces):
        set_trace_mode(model, trace.training)
        changes = Changes()
        plan_network(model, graph, mask, changes)
        changes.apply()
        try:
            found = _run(model, images, graph, None)
        finally:
            changes.revert()
        if found.failure is not None:
            return found.failure
        with masked(model, graph, mask, number):
            expected = _run(model, images, graph, mask)
        failure = _difference(expected, found)
        if failure is not None:
            return failure
    return None


def _random_mask(graph: ChannelGraph) -> np.ndarray:
    """Between 30 % and 70 % of each group's units stay, differently for each group."""
    generator = np.random.Generator(np.random.Philox(7))
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        count = int(np.clip(round(group.width * generator.uniform(0.3, 0.7)), 1, group.width - 1))
        mask[group.units] = False
        mask[group.units[generator.choice(group.width, count, replace=False)]] = True
    return mask


@dataclasses.dataclass
class _Run:
    """What a trial run left: one summary per module call, the outputs, or where it stopped."""

    calls: list[tuple[str, Tensor]]
    outputs: list[Tensor]
    failure: Failure | None = None


def _run(model: nn.Module, images: tuple[Any, ...], graph: ChannelGraph, mask: np.ndarray | None) -> _Run:
    """Run the network and summarise the output of every leaf module, channel by channel."""
    run = _Run([], [])
    places: dict[tuple[str, int], list[Place]] = {}
    for place in graph.places:
        if place.kind == "output" and place.is_leaf:
            places.setdefault((place.module, place.call), []).append(place)
    stack: list[str] = []
    counts: dict[str, int] = {}

    def enter(name: str) -> Any:
        return lambda module, args: stack.append(name)

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()
            counts[name] = counts.get(name, 0) + 1
            if isinstance(output, Tensor) and output.is_floating_point():
                with _disable_current_modes():
                    summary = _summary(output, places.get((name, counts[name] - 1), []), mask)
                run.calls.append((name, summary))

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave(name) if is_leaf(module) else _pop(stack)))
    try:
        result = model(*images)
        run.outputs = [leaf for leaf in tree_leaves(as_tree(result)) if isinstance(leaf, Tensor)]
    except Exception as error:  # whatever a network raises on a cut is what we want to know
        where = stack[-1] if stack else ""
        kind = type(model.get_submodule(where)).__name__
        run.failure = Failure(where, f"{kind} {where!r} raises {type(error).__name__}: {_first_line(error)}")
    finally:
        for handle in handles:
            handle.remove()
    return run


def _pop(stack: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    return hook


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _summary(output: Tensor, places: list[Place], mask: np.ndarray | None) -> Tensor:
    """(2, C) mean and mean square of every channel that stays; of the whole where no channels are known."""
    values = output.detach().float()
    if not places or values.dim() != len(places[0].shape):
        return torch.stack([values.mean(), values.square().mean()]).reshape(2, 1)
    for place in places:
        if mask is None:
            break
        stays = np.flatnonzero((place.units < 0) | mask[np.maximum(place.units, 0)])
        values = values.index_select(place.dim, torch.from_numpy(stays).to(values.device))
    values = values.movedim(places[0].dim, 0).flatten(1)
    return torch.stack([values.mean(dim=1), values.square().mean(dim=1)])


def _difference(expected: _Run, found: _Run) -> Failure | None:
    if expected.failure is not None:
        return expected.failure
    for (name, left), (other, right) in zip(expected.calls, found.calls, strict=False):
        if name != other or left.shape != right.shape:
            return Failure(other, f"the path or shape changes at {other!r}")
        error = (left - right).abs().amax(dim=1) / left.abs().amax(dim=1).clamp(min=1e-12)
        if not bool((error <= _MODULE_TOLERANCE).all()):
            return Failure(name, f"{name!r} computes something else on fewer channels")
    for left, right in zip(expected.outputs, found.outputs, strict=True):
        if left.shape != right.shape:
            return Failure("", "the shape of the output changes")
        error = (left.float() - right.float()).abs().max() / left.float().abs().max().clamp(min=1e-12)
        if not bool(error <= TOLERANCE):
            return Failure("", f"the output differs by {float(error):.1e}")
    return None
