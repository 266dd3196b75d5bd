"""Parameters and buffers by their qualified names."""

from __future__ import annotations

from torch import Tensor, nn

from image_classification.models.module_tree import named_modules


def tensor_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the first qualified name of every parameter and buffer to all of its names."""
    names: dict[int, list[str]] = {}
    for source in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in source:
            names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: tuple(aliases) for aliases in names.values()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by its first qualified name; parameters first."""
    parameters: dict[int, tuple[str, Tensor]] = {}
    buffers: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        for found, table in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (prefix + name, tensor))
    return dict([*parameters.values(), *buffers.values()])
