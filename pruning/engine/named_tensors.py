"""Parameters, buffers and tensors in plain attributes, by their qualified names."""

from __future__ import annotations

from torch import Tensor, nn

from image_classification.models.module_tree import named_modules, tensors_by_all_names
from image_classification.models.plain_tensors import plain_tensors


def tensor_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the first qualified name of every parameter, buffer and plain tensor to all of its names."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*tensors_by_all_names(model), *plain_tensors(model).items()):
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: tuple(aliases) for aliases in names.values()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, buffer and plain tensor once, by its first qualified name; parameters first."""
    parameters: dict[int, tuple[str, Tensor]] = {}
    buffers: dict[int, tuple[str, Tensor]] = {}
    plain: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        for found, table in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (prefix + name, tensor))
    for name, tensor in plain_tensors(model).items():
        plain.setdefault(id(tensor), (name, tensor))
    return dict([*parameters.values(), *buffers.values(), *plain.values()])


def is_in_attribute(model: nn.Module, name: str) -> bool:
    """Whether this is the name of a tensor in a plain attribute, which the network may have dropped for the moment."""
    owner, _, place = name.rpartition(".")
    module = dict(named_modules(model)).get(owner)
    return module is not None and place.partition("[")[0] in vars(module)
