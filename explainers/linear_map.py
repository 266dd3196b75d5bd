"""The linear operators of a recorded network: apply them, or their transpose, with any weights of the same shape.

Attribution rules need `w⁺ ∗ x`, `w⁻ ∗ x` and the transposes of both, for convolutions (strided, dilated, grouped,
transposed) and matrix products alike.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from explainers.record import Step, Value


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A convolution or a matrix product `x @ weight`, without its bias.

    Attributes:
        weight: (C_out, C_in/groups, kH, kW) of a convolution, (C_in, C_out/groups, …) of a transposed one, or
            (C_in, C_out) of a product.
        bias: (C_out,) or None.
        settings: Stride, padding, dilation, transposed, output padding, groups of a convolution; None for a product.
    """

    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...] | None

    def apply(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """`weight ∗ inputs`, without bias."""
        if self.settings is None:
            return inputs @ weight
        return torch.ops.aten.convolution(inputs, weight, None, *self.settings)

    def transpose(self, outputs: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
        """`weightᵀ ∗ outputs`, of the shape of `inputs`."""
        if self.settings is None:
            return outputs @ weight.t()
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        return torch.ops.aten.convolution_backward(
            outputs,
            inputs,
            weight,
            None,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            [True, False, False],
        )[0]

    def can_scale(self) -> bool:
        """Whether `scaled` is possible: everything but transposed convolutions."""
        return self.settings is None or not self.settings[3]

    def scaled(self, scale: Tensor, shift: Tensor) -> LinearMap:
        """The map followed by `· scale + shift` per output channel, both (C_out,)."""
        if self.settings is None:
            weight = self.weight * scale
        else:
            weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return LinearMap(weight, bias, self.settings)


def linear_map_of(step: Step) -> tuple[LinearMap | None, Value | None]:
    """The weights of a step and the value that they apply to; (None, None) if it is no map with constant weights."""
    if step.name in ("aten::convolution", "aten::_convolution", "aten::cudnn_convolution"):
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        settings = tuple(step.argument(name) for name in names)
        signal, weight, bias = step.argument("input", "self"), step.argument("weight"), step.argument("bias")
    elif step.name == "aten::addmm":
        if step.argument("alpha") != 1 or step.argument("beta") != 1:
            return None, None
        settings = None
        signal, weight, bias = step.argument("mat1"), step.argument("mat2"), step.argument("self")
    elif step.name == "aten::mm":
        settings = None
        signal, weight, bias = step.argument("self"), step.argument("mat2"), None
    else:
        return None, None
    if isinstance(signal, Tensor) or not isinstance(weight, Tensor):
        return None, None
    return LinearMap(weight, bias, settings), signal
