"""Networks built on another device, or on none at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from image_classification.models.registry import ModelError

#: Builds a network.
Factory = Callable[[], nn.Module]


def building_on(device: torch.device | str | None) -> AbstractContextManager[object]:
    """Return a context in which new tensors are created on `device`; None keeps PyTorch's default."""
    return nullcontext() if device is None else torch.device(device)


def on_meta(build: Factory) -> nn.Module:
    """Run `build` without allocating memory for its tensors and without affecting the random state.

    A builder that depends on values (such as torchvision's RegNet) cannot run on PyTorch's meta device; it then runs on
    the CPU, where real errors show.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError, ModelError):
            with torch.device("cpu"):
                return build()
