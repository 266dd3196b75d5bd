"""Convolutions and matrix products that leave out what is multiplied by zero.

The masked network, to which every cut is compared, is as wide as the whole one, and most of its weights are zero. Zeros
are found in the weights themselves, whatever the channel graph says, so that it remains an independent reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.operator_mode import OperatorMode

_ATEN = torch.ops.aten
_WORTH_IT = 1 << 22  # MACs; of less the search for zeros takes longer than the zeros
_LEAST_SAVING = 0.25  # share of the MACs
#: Terms of a sum from which on computing a column of zeros takes longer than putting it in its place.
_MANY = 256


class SkippedZeros(OperatorMode):
    """Computes the same from the rows and columns of weights that hold anything other than zero."""

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """See `OperatorMode`."""
        if not kwargs:
            if func is _ATEN.convolution.default:
                return _convolution(*args)
            if func is _ATEN.mm.default:
                return _product(args[0], args[1], None)
            if func is _ATEN.addmm.default and args[0].dim() == 1:
                return _product(args[1], args[2], args[0])
        return func(*args, **kwargs)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: object) -> Tensor:
    """Convolve the channels that matter; `options` are stride, padding, dilation, transposed, …, groups."""
    transposed, groups = options[3], options[5]
    macs = x.shape[0] * math.prod(x.shape[2:]) * weight.numel()
    found = None if groups != 1 or transposed or macs < _WORTH_IT else _nonzero(weight)
    if found is None:
        convolved: Tensor = _ATEN.convolution.default(x, weight, bias, *options)
        return convolved
    rows, columns = found
    few = _ATEN.convolution.default(
        x.index_select(1, columns), weight.index_select(0, rows).index_select(1, columns), None, *options
    )
    shape = (few.shape[0], weight.shape[0], *few.shape[2:])
    result = torch.empty(shape, dtype=few.dtype, device=few.device, memory_format=_format(x, weight))
    result.zero_().index_copy_(1, rows, few)
    if bias is not None:
        result += bias.reshape(-1, *[1] * (result.dim() - 2))
    return result


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """(n, k) × (k, m), the second being a weight."""
    found = None if left.shape[0] * right.numel() < _WORTH_IT else _nonzero(right)
    if found is None:
        return _plain_product(left, right, bias)
    rows, columns = found
    left, right = left.index_select(1, rows), right.index_select(0, rows)
    if len(rows) < _MANY:
        return _plain_product(left, right, bias)
    few: Tensor = _ATEN.mm.default(left, right.index_select(1, columns))
    shape = (left.shape[0], right.shape[1])
    result = few.new_zeros(shape) if bias is None else bias.expand(shape).clone()
    return result.index_add_(1, columns, few)


def _plain_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = (
        _ATEN.mm.default(left, right) if bias is None else _ATEN.addmm.default(bias, left, right)
    )
    return product


def _nonzero(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The positions along the first two dimensions that hold anything; None if leaving others out saves little."""
    count = weight.shape[0] * weight.shape[1]
    flat = weight.flatten(1)
    # By extremes, which take no intermediate of the weight's size.
    rows = (flat.amax(1) != 0) | (flat.amin(1) != 0)
    columns = ((flat.amax(0) != 0) | (flat.amin(0) != 0)).reshape(weight.shape[1], -1).any(1)
    rows, columns = rows.nonzero().flatten(), columns.nonzero().flatten()
    return (rows, columns) if 0 < len(rows) * len(columns) <= (1 - _LEAST_SAVING) * count else None


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's result, which a `view` behind it may rely on."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    for tensor in (x, weight):
        if last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return last
    return torch.contiguous_format
