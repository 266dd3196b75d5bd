"""Linear operators of a recorded network, applied directly or transposed, with any weights of the same shape.

Attribution rules need `w⁺ ∗ x`, `w⁻ ∗ x` and the transposes of both, for convolutions (strided, dilated, grouped,
transposed) and matrix products alike.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

#: Stride, padding, dilation, transposed, output padding, groups.
ConvolutionSettings = tuple[list[int], list[int], list[int], bool, list[int], int]


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A convolution or a matrix product `x @ weight`, without its bias.

    Attributes:
        weight: (C_out, C_in/groups, kH, kW) of a convolution, (C_in, C_out/groups, …) of a transposed one, or
            (C_in, C_out) of a product.
        bias: (C_out,) or None.
        settings: Settings of a convolution; None for a product.
    """

    weight: Tensor
    bias: Tensor | None
    settings: ConvolutionSettings | None

    def apply(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return `weight ∗ inputs`, without bias."""
        if self.settings is None:
            return inputs @ weight
        outputs: Tensor = torch.ops.aten.convolution(inputs, weight, None, *self.settings)
        return outputs

    def transpose(self, outputs: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
        """Return `weightᵀ ∗ outputs`, in the shape of `inputs`."""
        if self.settings is None:
            return outputs @ weight.t()
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        inputs_gradient: Tensor = torch.ops.aten.convolution_backward(
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
        return inputs_gradient

    def of_ones(self) -> LinearMap:
        """Return the map with all weights 1, acting on the channel sums that `sum_channels` makes."""
        if self.settings is None:
            return LinearMap(self.weight.new_ones(1, 1), None, None)
        return LinearMap(
            self.weight.new_ones(self.settings[-1], 1, *self.weight.shape[2:]), None, self.settings
        )

    def sum_channels(self, tensor: Tensor) -> Tensor:
        """Sum inputs or outputs over the channels of each group: (B, groups, …), or (…, 1) for a product."""
        if self.settings is None:
            return tensor.sum(-1, keepdim=True)
        summed: Tensor = tensor.unflatten(1, (self.settings[-1], -1)).sum(2)
        return summed

    def repeat_channels(self, tensor: Tensor, inputs: Tensor) -> Tensor:
        """Undo `sum_channels`: repeat each group's single channel for all its channels, in the shape of `inputs`."""
        if self.settings is None:
            return tensor.expand_as(inputs)
        return tensor.repeat_interleave(inputs.shape[1] // self.settings[-1], dim=1)

    def can_scale(self) -> bool:
        """Whether `scaled` is possible: everything but transposed convolutions."""
        return self.settings is None or not self.settings[3]

    def scaled(self, scale: Tensor, shift: Tensor) -> LinearMap:
        """Return the map followed by `· scale + shift` per output channel, both (C_out,)."""
        if self.settings is None:
            weight = self.weight * scale
        else:
            weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return LinearMap(weight, bias, self.settings)
