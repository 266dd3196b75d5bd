"""Tensors that modules keep in plain attributes: neither parameters nor buffers, but part of what a network computes.

A table of positions (`self.positions = sinusoids(…)`), a scale, lists and dicts of these. No state dict holds them, and
`model.to(…)` leaves them alone; a network gets them from its constructor. Those that are computed from weights, or are
views of them, are none of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from image_classification.models.module_tree import named_modules

#: Containers within containers are looked into as far as this.
DEEPEST = 3
_MOST_ITEMS = 256
_CONTAINERS = (list, tuple, dict)  # not their subclasses, which may hold more than their items
_OF_PYTORCH = ("torch.nn.", "torch.ao.", "torch.jit.")


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in plain attributes by all their names, such as `embed.positions` or `block.scales[0]`.

    A name is that of the module, a dot, and what holds the tensor, without further dots. PyTorch's own layers hold
    none.
    """
    found = {
        f"{prefix}.{place}" if prefix else place: tensor
        for prefix, module in named_modules(model)
        if not type(module).__module__.startswith(_OF_PYTORCH)
        for place, tensor in _held_by(module)
    }
    if not found:
        return {}
    weights = {_memory(tensor) for _, module in named_modules(model) for tensor in _registered(module)}
    return {name: tensor for name, tensor in found.items() if _memory(tensor) not in weights}


def cut_plain_tensors(model: nn.Module, shapes: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the plain tensors of a network that a description of its structure gives a shape: those that were cut."""
    return {name: tensor for name, tensor in plain_tensors(model).items() if name in shapes}


def _held_by(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the module's own tensors in plain attributes, with the attribute (and the item) that holds each."""
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules") or _is_computed(module, name):
            continue
        yield from _tensors_in(value, name, 0)


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether an old-style norm or mask of PyTorch computes the attribute from a parameter in every pass."""
    return f"{name}_g" in module._parameters or f"{name}_orig" in module._parameters


def _tensors_in(value: object, place: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if _is_constant(value):
            yield place, value
        return
    if not isinstance(value, (list, tuple, dict)) or type(value) not in _CONTAINERS:
        return
    if depth == DEEPEST or len(value) > _MOST_ITEMS:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for number, (key, item) in enumerate(items):
        readable = isinstance(key, int) or (isinstance(key, str) and key.isidentifier())
        yield from _tensors_in(item, f"{place}[{key if readable else number}]", depth + 1)


def _is_constant(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one that nothing has computed from weights."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return ordinary and tensor.is_leaf and not tensor.is_inference() and tensor.dim() > 0


def _registered(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    """Return a key of the memory that a tensor, or what it is a view of, lies in; its own if it lies in none."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor.device, id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)
