"""Exponential moving average of a network's weights and buffers.

`torch.optim.swa_utils.AveragedModel` does the same sum but asks the device for its step counter in every update,
a host synchronisation per iteration; this one keeps the count on the host.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Keeps `average ← decay·average + (1 − decay)·weights` of a network in a second one.

    Floating-point parameters and buffers (BN statistics among them) are averaged, integer buffers copied.

    Args:
        model: The network to follow; copied at once.
        decay: Share of the old average kept per update, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the present weights of `model` (same structure)."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        # A tensor shared by two modules is listed once in both networks: `parameters` and `buffers` are unique.
        mine = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        for average, value in zip(mine, theirs, strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value.detach())
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1.0 - self.decay)
