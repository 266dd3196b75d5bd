"""Cuts a network several times and compares it with the original with the removed slices at zero."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.cutting import RewriteError
from pruning.engine.examples import output_tensors
from pruning.engine.groups import Group
from pruning.engine.kept_statistics import StatisticsOverKept
from pruning.engine.named_tensors import named_tensors
from pruning.engine.proof.rehearsal import condition, masked_tensors
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.engine.undisturbed import set_trace_mode

TOLERANCE = 1e-9


def tenth(group: Group, generator: np.random.Generator) -> np.ndarray:
    """Keep a tenth of a group's units."""
    return np.sort(generator.choice(group.width, max(1, group.width // 10), replace=False))


def some(group: Group, generator: np.random.Generator) -> np.ndarray:
    """Keep any number of a group's units."""
    count = int(generator.integers(1, group.width + 1))
    return np.sort(generator.choice(group.width, count, replace=False))


def last_ones(group: Group, generator: np.random.Generator) -> np.ndarray:
    """Keep the last three units of every group, so that widths come out equal."""
    return np.arange(group.width)[-3:]


def outputs(model: nn.Module, args: tuple[Any, ...], training: bool) -> list[Tensor]:
    """Return every tensor that the network outputs, in evaluation or training mode; noise is seeded with 0."""
    model = copy.deepcopy(model)
    set_trace_mode(model, training)
    torch.manual_seed(0)
    with torch.no_grad():
        found = output_tensors(model(*args))
    with torch._C.DisableTorchFunctionSubclass():
        return [tensor.as_subclass(Tensor) for tensor in found]


def outputs_without(
    model: nn.Module, graph: ChannelGraph, keep: dict[str, np.ndarray], args: tuple[Any, ...], training: bool
) -> list[Tensor]:
    """Return the outputs of the whole network with every removed slice at zero.

    Statistics over channels must be taken over the kept ones, and weights computed from a removed slice must keep their
    values: in these cases the engine's own reference is used.
    """
    mask = graph.keep_mask(keep)
    if computes_weights(model):
        masked = copy.deepcopy(model)
        tensors = named_tensors(masked)
        for name, values in masked_tensors(masked, graph, mask).items():
            tensors[name].data = values
    else:
        masked = zeroed(model, graph, keep)
    trace = next((one.trace for one in graph.passes if one.training == training), 0)
    statistics = StatisticsOverKept(graph.statistics, mask, trace)
    with statistics if graph.statistics else contextlib.nullcontext():
        return outputs(masked, args, training)


def zeroed(model: nn.Module, graph: ChannelGraph, keep: dict[str, np.ndarray]) -> nn.Module:
    """Return a copy in which every removed slice is zero, except vectors that are used as divisors."""
    divisors = {name for one in graph.passes for name in one.divisors}
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    for name, kept in keep.items():
        for member in graph.members(name):
            if member.tensor in divisors:
                continue
            gone = (member.positions >= 0) & ~np.isin(member.positions, kept)
            tensors[member.tensor].data.index_fill_(member.dim, torch.from_numpy(np.flatnonzero(gone)), 0)
    return model


def computes_weights(model: nn.Module) -> bool:
    """Whether a weight depends on removed slices of its parameter, so that zeroing them would change the others."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    computed = any(hasattr(module, "parametrizations") for module in model.modules())
    return computed or any(hasattr(hook, "dim") for hook in hooks)


def close(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether all tensors have the same shapes and values."""
    if [e.shape for e in expected] != [f.shape for f in found]:
        return False
    for left, right in zip(expected, found, strict=True):
        scale = max(1.0, float(left.double().abs().max())) if left.numel() else 1.0
        if left.numel() and not float((left.double() - right.double()).abs().max()) <= TOLERANCE * scale:
            return False
    return True


def cut_equals_zeroed(
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    others: Sequence[tuple[Any, ...]] = (),
    noisy: bool = False,
    rewrites: Sequence[Callable[..., np.ndarray]] = (some, tenth, last_ones),
    graph: ChannelGraph | None = None,
) -> tuple[nn.Module, ChannelGraph, int]:
    """Cut a network once per selection method, one after the other, and compare in both modes.

    Args:
        model: Network in float64; not modified.
        args: The example.
        others: Other arguments to compare on: other batch sizes, other image sizes.
        noisy: Whether it draws random numbers in training, so that only shapes can be compared there.
        rewrites: Selection methods of the kept channels.
        graph: Graph of the network; traced here by default.

    Returns:
        The cut network, its graph, and how many rewrites were refused.
    """
    model = copy.deepcopy(model)
    graph = trace_groups(model, args) if graph is None else graph
    refused = 0
    for seed, choose in enumerate(rewrites):
        generator = np.random.default_rng(seed)
        keep = {group.name: choose(group, generator) for group in graph.prunable}
        cut, followed = copy.deepcopy(model), copy.deepcopy(graph)
        try:
            prune_channels(cut, followed, keep)
        except RewriteError:
            refused += 1
            continue
        for arguments in (args, *others):
            for training in (False, True):
                found = outputs(cut, arguments, training)
                expected = outputs_without(model, graph, keep, arguments, training)
                if noisy and training:
                    assert [e.shape for e in expected] == [f.shape for f in found]
                else:
                    assert close(expected, found), (
                        choose.__name__,
                        training,
                        {k: len(v) for k, v in keep.items()},
                    )
        model, graph = cut, followed
    return model, graph, refused


def prepared(model: nn.Module, args: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the network in float64 with distinguishable channels, and its arguments."""
    condition(model, args)
    doubled = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    model = model.double()
    with torch.no_grad():
        # Until then, old weight norms keep a weight with a gradient function, which cannot be copied.
        model(*doubled)
    return model, doubled
