"""Materialisation of lazy modules (`nn.LazyConv2d` and the like) from known shapes, without a first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy


def settle(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Materialise the lazy modules of a fresh network, as their first batch would.

    Args:
        model: The network; changed in place.
        shapes: Qualified name → shape of its tensors; a lazy module with missing shapes stays lazy.

    Returns:
        The same network. Allocated tensors are uninitialised.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        tensors = {**module._parameters, **module._buffers}
        own = {key: tensor for key, tensor in tensors.items() if tensor is not None and is_lazy(tensor)}
        if own and isinstance(module, LazyModuleMixin) and all(prefix + key in shapes for key in own):
            for key, tensor in own.items():
                tensor.materialize(tuple(shapes[prefix + key]))
            _become(module)
    return model


def _become(module: Any) -> None:
    """Do what `LazyModuleMixin` does after its first batch, with the counts taken from the tensors' shapes."""
    module._initialize_hook.remove()
    module._load_hook.remove()
    del module._initialize_hook, module._load_hook
    if module.cls_to_become is not None:
        module.__class__ = module.cls_to_become
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels = module.weight.shape[0]
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.in_features = module.weight.shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        counted = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if counted is None else len(counted)
