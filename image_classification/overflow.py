"""Skipping updates with overflowing fp16 gradients on the device.

PyTorch's scaler syncs with the host in every step to check for overflows, unless the optimizer can skip the update by
itself. The fused kernels of SGD and Adam can; `DecidesOnDevice` adds this to any optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DecidesOnDevice(Optimizer):
    """Optimizer mixin: `class Mine(DecidesOnDevice, torch.optim.RMSprop)`.

    Under a scaler the step is always taken, and then reverted if gradients were not finite. This costs a copy of
    weights and state but no sync. Values on the host, such as step counts, are not reverted.
    """

    #: Read by `torch.amp.GradScaler`, which then sets `found_inf` and `grad_scale` during a step.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See the optimizer's `step`."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return super().step(closure)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale is not None:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.div_(scale)
        before = {id(tensor): tensor.clone() for tensor in self._changing(parameters)}
        loss = super().step(closure)
        overflow = found_inf > 0
        for tensor in self._changing(parameters):
            old = before.get(id(tensor), torch.zeros_like(tensor))  # state starts at zero
            tensor.copy_(torch.where(overflow, old, tensor))
        return loss

    def _changing(self, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """Return the weights and their optimizer state."""
        states = [self.state.get(parameter, {}).values() for parameter in parameters]
        kept = [value for values in states for value in values if isinstance(value, Tensor) and value.dim()]
        return [*parameters, *kept]
