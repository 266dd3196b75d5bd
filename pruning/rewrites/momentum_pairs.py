"""A network and its momentum teacher within one module: such pairs must be cut identically."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn

from pruning.engine.channel_graph import ChannelGraph

log = logging.getLogger(__name__)


def warn_of_pairs(model: nn.Module, graph: ChannelGraph) -> None:
    """Warn of submodules that look like a network and its momentum teacher but would be cut independently."""
    for one, two in momentum_pairs(model):
        if not _cut_alike(graph, one, two):
            log.warning(
                "%r and %r have the same parameters, of which only one's are trained, as a network and its momentum "
                "teacher have, but they are cut independently: if one is updated from the other, leave both alone "
                "(`ignored`)",
                one,
                two,
            )


def momentum_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return pairs of submodules that look like a network and its momentum teacher: alike, siblings, only one
    trained.
    """
    found = []
    for prefix, parent in model.named_modules():
        children = [(name, _shapes(child), child) for name, child in parent.named_children()]
        for position, (name, shapes, child) in enumerate(children):
            for other_name, other_shapes, other in children[position + 1 :]:
                if len(shapes) > 1 and shapes == other_shapes and _trains(child) != _trains(other):
                    start = f"{prefix}." if prefix else ""
                    found.append((start + name, start + other_name))
    return found


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _cut_alike(graph: ChannelGraph, one: str, two: str) -> bool:
    """Whether every slice of one submodule's parameters is removed together with the other's."""
    prunable = {group.index for group in graph.prunable}
    units: dict[str, dict[tuple[str, int], np.ndarray]] = {one: {}, two: {}}
    for axis in graph.axes:
        groups = graph.group_of_unit[axis.units[axis.units >= 0]]
        for name, found in units.items():
            if axis.tensor.startswith(f"{name}.") and prunable & set(groups.tolist()):
                found[axis.tensor.removeprefix(f"{name}."), axis.dim] = axis.units
    mine, theirs = units[one], units[two]
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)
