"""Updates of overflowing fp16 gradients, left out on the device.

PyTorch's scaler asks the host in every step whether gradients have overflowed, unless the optimizer can leave the
update out by itself. The fused kernels of SGD and Adam can; `DecidesOnDevice` makes any optimizer able to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DecidesOnDevice(Optimizer):
    """Mixed into an optimizer: `class Mine(DecidesOnDevice, torch.optim.RMSprop)`.

    Under a scaler the step is always taken, and then taken back where gradients were not finite; that costs a copy of
    weights and state, and nobody waits. Numbers on the host, such as counts of steps, go on.
    """

    #: Read by `torch.amp.GradScaler`, which then sets `found_inf` and `grad_scale` during a step.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As of the optimizer."""
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
            old = before.get(id(tensor), torch.zeros_like(tensor))  # state of a first step begins with zeros
            tensor.copy_(torch.where(overflow, old, tensor))
        return loss

    def _changing(self, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """Weights, and what is kept of them."""
        states = [self.state.get(parameter, {}).values() for parameter in parameters]
        kept = [value for values in states for value in values if isinstance(value, Tensor) and value.dim()]
        return [*parameters, *kept]
