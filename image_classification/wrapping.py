"""Wraps a network in DistributedDataParallel for this package's trainings."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from image_classification.models.running import Kwargs

#: Whether DistributedDataParallel sends buffers before every forward pass; PyTorch has renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


def _only_batch_norm(model: nn.Module) -> bool:
    """Whether all buffers are running statistics, which training does not read, so that they are only shared when
    needed.

    DDP would broadcast rank 0's buffers before every forward pass.
    """
    statistics = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer in module.buffers(recurse=False)
    }
    return all(id(buffer) in statistics for buffer in model.buffers())


def in_ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a network so that gradients are averaged over the ranks; collective."""
    buffers: Kwargs = {_SYNC_BUFFERS: not _only_batch_norm(model)}
    # No `static_graph`: it saves a search that is off anyway, and fails where the first micro-batch sends nothing.
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **buffers,
    )


def check_unwrapped(wrappers: Sequence[weakref.ref[nn.Module]]) -> None:
    """Check that released wrappers have been freed.

    Raises:
        AssertionError: A wrapper is still alive: gradients would go to the network as it was before a rewrite.
    """
    gc.collect()  # wrappers and compiled graphs refer to each other
    kept = [type(wrapper()).__name__ for wrapper in wrappers if wrapper() is not None]
    assert not kept, f"something still refers to {kept}: gradients would go to the network before the rewrite"
