"""Tensors as `torch.func` (vmap, grad) shows them inside: without storage, and lacking dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is what `torch.func` (vmap, grad) shows inside: it has no storage, and lacks dimensions."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor wrapped by `torch.func`."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
