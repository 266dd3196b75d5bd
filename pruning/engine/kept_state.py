"""Saves and restores the state that forward passes change: buffers, caches, parameters.

A forward pass may write into a buffer, put another tensor in its place (`self.mean = …`), keep what it computed in an
attribute, or update a momentum teacher. Passes that only inspect a network must leave no trace.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from image_classification.models.module_tree import buffers as buffers_of
from image_classification.models.module_tree import named_modules, named_parameters, overlaps
from image_classification.models.plain_tensors import plain_tensors

_CONTAINERS = (dict, OrderedDict, list, set)
# Hooks that a forward pass adds once, and notes in an attribute, would be added again if only the attribute went.
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
# `modes_restored` puts the mode back, by way of the module's own `train()`; hooks have a memory of their own.
_NOT_KEPT = frozenset({"training", *_HOOKS})


@contextlib.contextmanager
def state_kept(model: nn.Module, written: Iterable[str] = ()) -> Iterator[None]:
    """Restore tensors and attributes of the network's modules on exit, whatever runs inside.

    Tensors are again the same objects with the same storage. The modes must be the same at the end as at the start:
    modules may change their attributes when they are put into another mode.

    Args:
        model: The network.
        written: Names of parameters that a pass writes into; for other parameters only the storage is restored.
    """
    parameters = named_parameters(model)
    buffers = buffers_of(model)
    looked_after = [*buffers, *(parameters[name] for name in written if name in parameters)]
    plain = list({id(tensor): tensor for tensor in plain_tensors(model).values()}.values())
    storages = [(tensor, tensor.data) for tensor in (*parameters.values(), *buffers, *plain)]
    plain_values = [(tensor, tensor.detach().clone()) for tensor in plain if not overlaps(tensor)]
    values = [(tensor, tensor.detach().clone()) for tensor in looked_after if not overlaps(tensor)]
    try:
        with attributes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, storage in storages:
                if _has_moved(tensor, storage):
                    tensor.data = storage
            for tensor, old in values:
                tensor.copy_(old)
            for tensor, old in plain_values:
                if not torch.equal(tensor, old):  # else a graph that is still alive may need it untouched
                    tensor.data.copy_(old)


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restore attributes and hooks as `state_kept` does, but keep the values written into buffers."""
    attributes = [
        (vars(module), _remembered(vars(module)), _hooks(vars(module))) for _, module in named_modules(model)
    ]
    try:
        yield
    finally:
        for table, before, hooks in attributes:
            _put_back(table, *before)
            for name in hooks.keys() | _hooks(table).keys():
                if not _same(table[name], hooks.get(name, {})):
                    _refill(table[name], hooks.get(name, {}))


def _hooks(table: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Return copies of a module's hooks, by the attribute that holds them; the kinds without any are left out."""
    return {name: dict(hooks) for name in _HOOKS if (hooks := table.get(name))}


def _has_moved(tensor: Tensor, storage: Tensor) -> bool:
    """Whether a tensor's data are in another place or of another shape. Sparse tensors have no single place."""
    if tensor.layout != torch.strided:
        return tensor.shape != storage.shape
    return tensor.data_ptr() != storage.data_ptr() or tensor.shape != storage.shape


def _remembered(table: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Return a module's attributes, and every container among them with a shallow copy of it."""
    kept = table.copy()
    containers = [
        (value, value.copy())
        for name, value in kept.items()
        if type(value) in _CONTAINERS and name not in _NOT_KEPT
    ]
    return kept, containers


def _put_back(table: dict[str, Any], kept: dict[str, Any], containers: list[tuple[Any, Any]]) -> None:
    if not _same(table, kept):
        for name in table.keys() - kept.keys() - _NOT_KEPT:
            del table[name]
        for name, value in kept.items():
            if name not in _NOT_KEPT and table.get(name) is not value:
                table[name] = value
    for container, copy in containers:
        if not _same(container, copy):
            _refill(container, copy)


def _same(value: Any, copy: Any) -> bool:
    """Whether a container holds the same objects as its copy."""
    if len(value) != len(copy):
        return False
    if isinstance(value, dict):
        in_order = all(map(operator.is_, value, copy))  # names are the same objects, if nothing came or went
        return in_order and all(map(operator.is_, value.values(), copy.values()))
    if isinstance(value, set):
        return bool(value == copy)
    return all(map(operator.is_, value, copy))


def _refill(value: Any, copy: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(copy)
    else:
        value.update(copy)
