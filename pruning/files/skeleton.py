"""Skeletons: a network's modules without memory for their weights, to record a user-defined network before pruning."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a network's modules, with parameters and buffers on PyTorch's meta device.

    Other attributes are shared with the network, except that lists and mappings, which it may modify, are copied.
    Unnamed tensors (computed weights) are on the meta device too, so that no autograd graph is kept alive.
    Non-persistent buffers keep their values, on the CPU, since they cannot be restored from a file.

    Args:
        model: The network; not modified.
    """
    return _without_memory(model, {})


def _without_memory(module: nn.Module, known: dict[int, nn.Module | Tensor | None]) -> nn.Module:
    """Return a module's skeleton; shared objects stay shared in it."""
    twin = known.get(id(module))
    if isinstance(twin, nn.Module):
        return twin
    twin = object.__new__(type(module))
    known[id(module)] = twin
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            value = _on_meta(value, known)
        twin.__dict__[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
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
