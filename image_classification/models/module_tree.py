"""The modules of a network as a flat list, and their modes.

A rewrite is tried dozens of times, and each try traverses all modules several times. PyTorch's own traversal asks every
module for its children each time. While nothing can change the tree, it is traversed only once:

    with walked_once(model):
        for name, module in named_modules(model):
            ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

NamedModules = tuple[tuple[str, nn.Module], ...]

_walked: dict[int, NamedModules] = {}


@contextlib.contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Cache `named_modules` inside the block, in which no module may be added or removed. A nested use is a no-op."""
    if id(model) in _walked:
        yield
        return
    _walked[id(model)] = tuple(model.named_modules())
    try:
        yield
    finally:
        del _walked[id(model)]


def named_modules(model: nn.Module) -> NamedModules:
    """Like the method of `nn.Module`: every module once, under its first name, parents first."""
    known = _walked.get(id(model))
    return tuple(model.named_modules()) if known is None else known


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter once, by its first qualified name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{prefix}.{name}" if prefix else name, parameter))
    return dict(found.values())


def overlaps(tensor: Tensor) -> bool:
    """Whether several positions share one element (`expand`), so that nothing can write to the tensor."""
    if tensor.layout != torch.strided:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def buffers(model: nn.Module) -> list[Tensor]:
    """Return every buffer once."""
    found: dict[int, Tensor] = {}
    for _, module in named_modules(model):
        for buffer in module._buffers.values():
            if buffer is not None:
                found.setdefault(id(buffer), buffer)
    return list(found.values())


def set_mode(model: nn.Module, training: bool) -> None:
    """Like `model.train(training)`, without the recursion if no module overrides `train`."""
    modules = named_modules(model)
    ordinary = all(type(one).train is nn.Module.train and "training" in vars(one) for _, one in modules)
    if not ordinary:
        model.train(training)
        return
    for _, module in modules:
        vars(module)["training"] = training


def is_leaf(module: nn.Module) -> bool:
    """Whether a module does its work itself; parametrizations of its tensors don't count as parts."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def tensors_by_all_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers under each of their names; shared ones occur repeatedly."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
