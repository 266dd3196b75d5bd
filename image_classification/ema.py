"""Exponential moving average of a network's weights and buffers.

`torch.optim.swa_utils.AveragedModel` computes the same average but reads its step counter from the device in every
update, a host sync per iteration; this class keeps the count on the host.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Maintains `average ← d·average + (1 − d)·weights` of a network in a second network.

    The decay warms up as in TensorFlow's `ExponentialMovingAverage` and timm's `ModelEmaV3`, so that an early average
    is not dominated by the network's random initialisation: update n (from 0) uses d = min(decay, (1 + n) / (10 + n)).

    Floating-point parameters and buffers (BN statistics among them) are averaged, integer buffers copied.

    Args:
        model: The network to follow; copied on construction.
        decay: Largest weight of the old average in an update, in [0, 1).

    Attributes:
        num_updates: Number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights of `model` (same structure)."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        # A tensor shared by two modules is averaged once, under its first name in the copy.
        mine = [*self.module.named_parameters(), *self.module.named_buffers()]
        theirs: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, average in mine:
            value = theirs[name]
            if average.is_floating_point():
                averages.append(average)
                values.append(value.detach())
            else:
                average.copy_(value)
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(averages, values, 1.0 - decay)
        self.num_updates += 1
