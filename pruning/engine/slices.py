"""Smaller copies of tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Dimension → indices that stay.
Cuts = dict[int, Tensor]


def sliced_like(tensor: Tensor, cuts: Cuts) -> Tensor:
    """Return a smaller copy with the given indices kept along each dimension, in the same memory format."""
    result = tensor.detach()
    for dim, index in cuts.items():
        result = result.index_select(dim, index.to(result.device))
    memory_format = _memory_format(tensor)
    if memory_format != torch.contiguous_format:
        result = torch.empty_like(result, memory_format=memory_format).copy_(result)
    return result


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            tensor.dim() == rank
            and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=memory_format)
        ):
            return memory_format
    if tensor.dim() == 4 and tensor.is_contiguous() and tensor.stride() != _row_major(tensor.shape):
        return torch.channels_last  # 1×1 kernels are contiguous both ways; their strides tell
    return torch.contiguous_format


def _row_major(shape: Iterable[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
