"""One trial: the network with some units cut must compute what the masked network does.

Masked means: all slices that carry removed units are zeroed in the full network, and statistics over channels
(LayerNorm, some GroupNorms, weight standardisation, means) are taken over the kept channels: what a network does
that never had the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from pruning.channel_graph import ChannelGraph
from pruning.groups import Group, Place
from pruning.rehearsal import as_float, masked
from pruning.surgery import Changes, plan_network
from pruning.tracing import Trace, as_tree, is_leaf, set_trace_mode

TOLERANCE = 1e-4
_MODULE_TOLERANCE = 1e-3


@dataclasses.dataclass
class Failure:
    """Where a trial failed: the innermost module, what happened, and whether it was an exception."""

    module: str
    message: str
    raised: bool = False


def first_failure(
    model: nn.Module,
    images: tuple[Any, ...],
    traces: list[Trace],
    graph: ChannelGraph,
    mask: np.ndarray | None = None,
) -> Failure | None:
    """Cut units (random halves of all prunable groups, if not told otherwise) and compare with the masked network."""
    mask = random_mask(graph, graph.prunable) if mask is None else mask
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
        set_trace_mode(model, trace.training)
        with masked(model, graph, mask, number):
            expected = _run(model, images, graph, mask)
        failure = _difference(expected, found)
        if failure is not None:
            return failure
    return None


def random_mask(graph: ChannelGraph, groups: list[Group]) -> np.ndarray:
    """Between 30 % and 70 % of each of these groups' units stay, differently for each group."""
    generator = np.random.Generator(np.random.Philox(7))
    mask = np.ones(graph.num_units, dtype=bool)
    for group in groups:
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
        if _lacks_memory(error):
            raise
        where = stack[-1] if stack else ""
        kind = type(model.get_submodule(where)).__name__
        run.failure = Failure(
            where, f"{kind} {where!r} raises {type(error).__name__}: {_first_line(error)}", True
        )
    finally:
        for handle in handles:
            handle.remove()
    return run


def _lacks_memory(error: Exception) -> bool:
    """Whether the machine is to blame, which says nothing about a cut."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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
    values = values.movedim(places[0].dim, 0)
    values = values.reshape(values.shape[0], -1)
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
