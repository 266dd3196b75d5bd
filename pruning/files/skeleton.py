"""Skeletons: a network's modules without memory for their weights, to record a user-defined network before pruning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from image_classification.models.plain_tensors import DEEPEST, plain_tensors

_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a network's modules, with parameters and buffers on PyTorch's meta device.

    Other attributes are shared with the network, except that lists and mappings, which it may modify, are copied.
    Computed weights are on the meta device too, so that no autograd graph is kept alive. Non-persistent buffers and
    tensors in plain attributes keep their values, on the CPU, since they cannot be restored from a file.

    Args:
        model: The network; not modified.
    """
    known: dict[int, nn.Module | Tensor | None] = {}
    for tensor in plain_tensors(model).values():
        known.setdefault(id(tensor), tensor.detach().cpu().clone())
    return _without_memory(model, known)


def _without_memory(module: nn.Module, known: dict[int, nn.Module | Tensor | None]) -> nn.Module:
    """Return a module's skeleton; shared objects stay shared in it."""
    twin = known.get(id(module))
    if isinstance(twin, nn.Module):
        return twin
    twin = object.__new__(type(module))
    known[id(module)] = twin
    for name, value in vars(module).items():
        if name not in _REGISTERED:
            twin.__dict__[name] = _attribute(value, known, 0)
    unsaved = module._non_persistent_buffers_set
    parameters = {name: _on_meta(value, known) for name, value in module._parameters.items()}
    buffers = {
        name: value.detach().cpu().clone()
        if name in unsaved and value is not None
        else _on_meta(value, known)
        for name, value in module._buffers.items()
    }
    modules = {
        name: None if child is None else _without_memory(child, known)
        for name, child in module._modules.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=modules)
    return twin


def _attribute(value: Any, known: dict[int, nn.Module | Tensor | None], depth: int) -> Any:
    """Return a plain attribute's value for the skeleton; containers are copied with the tensors in them."""
    if isinstance(value, Tensor):
        return _on_meta(value, known)
    if type(value) is dict and depth < DEEPEST:
        return {key: _attribute(item, known, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple) and depth < DEEPEST:
        return type(value)(_attribute(item, known, depth + 1) for item in value)
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _on_meta(tensor: Tensor | None, known: dict[int, nn.Module | Tensor | None]) -> Tensor | None:
    if tensor is None:
        return None
    twin = known.get(id(tensor))
    if not isinstance(twin, Tensor):
        twin = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        known[id(tensor)] = twin
    return twin
