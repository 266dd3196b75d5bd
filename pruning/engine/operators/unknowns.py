"""Operators on partly unknown inputs: tensors in which NaN means "depends on the image".

Most operators propagate NaN by themselves. This module holds those in which a zero makes its partner irrelevant (0 ·
unknown is 0), and those in which NaN would be lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from image_classification.models.running import Args, Kwargs, Outputs

#: (operator, arguments, keyword arguments) → its result. In-place operators may have written before.
ConstantRule = Callable[[OpOverload, Args, Kwargs], Outputs]

_ATEN = torch.ops.aten
_NAN = float("nan")


class NotFollowedError(ValueError):
    """An operator decides by values, so that NaN cannot stand for "unknown"."""


def carried(func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
    """Propagate NaN as PyTorch does.

    Raises:
        NotFollowedError: The result cannot represent unknown values: integers, booleans.
    """
    anything = bool(
        _unknown_masks((args, kwargs))
    )  # in-place operators overwrite what is asked here: look first
    result = func(*args, **kwargs)
    if anything:
        for leaf in tree_leaves(result):
            hidden = isinstance(leaf, Tensor) and not leaf.is_floating_point()
            if hidden or isinstance(leaf, (bool, int, float)):
                name = func.overloadpacket.__name__
                raise NotFollowedError(f"the operator {name!r} decides by values of the image")
    return result


def elementwise(func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
    """Compute element-wise; the result is unknown wherever any operand is, even if PyTorch drops the NaN."""
    masks = _unknown_masks((args, kwargs))
    result = carried(func, args, kwargs)
    if masks and isinstance(result, Tensor):
        joint = masks[0]
        for mask in masks[1:]:
            joint = joint | mask
        result.masked_fill_(joint, _NAN)
    return result


def with_positions(func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
    """Compute the operator as PyTorch does: its integer results are positions that only its own backward pass reads."""
    return func(*args, **kwargs)


def _unknown_masks(arguments: object) -> list[Tensor]:
    """Return a boolean mask of the unknown elements for each tensor among the arguments that has any."""
    masks = []
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            mask = torch.isnan(leaf)
            if bool(mask.any()):
                masks.append(mask)
    return masks


# -- operators in which a zero makes its partner irrelevant ------------------------------------------------


def _bilinear(contract: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, spread: Tensor) -> Tensor:
    """Contract a and b; the result is unknown wherever an unknown element meets one other than zero.

    `spread` marks further entries of a whose product counts as unknown.
    """
    unknown_a, unknown_b = torch.isnan(a), torch.isnan(b)
    values = contract(a.masked_fill(unknown_a, 0), b.masked_fill(unknown_b, 0))
    matters = (b != 0) | unknown_b
    count = contract((unknown_a | spread).to(a.dtype), matters.to(b.dtype))
    if bool(unknown_b.any()):
        count = count + contract((a != 0).to(a.dtype), unknown_b.to(b.dtype))
    return values.masked_fill(count > 0.5, _NAN)


def convolution(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """Zero weights make their input irrelevant; padding makes constants other than zero uneven."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    uneven = transposed or any(padding)
    spread = (x != 0) if uneven else torch.zeros_like(x, dtype=torch.bool)

    def contract(a: Tensor, b: Tensor) -> Tensor:
        convolved: Tensor = func(a, b, None, stride, padding, dilation, transposed, output_padding, groups)
        return convolved

    result = _bilinear(contract, x, weight, spread)
    if bias is not None:
        result = result + bias.reshape(-1, *[1] * (result.dim() - 2))
    return result


def matrix_product(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """Zeros of either factor make the other irrelevant."""
    a, b = args[-2:]
    plain = _ATEN.bmm.default if a.dim() == 3 else _ATEN.mm.default
    result = _bilinear(plain, a, b, torch.zeros_like(a, dtype=torch.bool))
    if len(args) == 2:
        return result
    total: Tensor = kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * result
    return total


def product(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """A factor of zero makes the other irrelevant."""
    zero: Tensor | bool = False
    for factor in args[:2]:
        zero = (factor == 0) | zero
    result: Tensor = func(*args, **kwargs)
    return result.masked_fill_(zero, 0) if isinstance(zero, Tensor) else result


def batch_norm(func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
    """Channels whose scale is zero show their shift alone."""
    weight, bias = args[1], args[2]
    result = func(*args, **kwargs)
    if weight is not None:
        off = weight == 0
        shift = torch.zeros_like(weight) if bias is None else bias
        result[0][:, off] = shift[off].to(result[0].dtype).reshape(-1, *[1] * (result[0].dim() - 2))
    return result


def average_pool(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """Padding makes constants other than zero uneven."""
    padding = args[3] if len(args) > 3 else (0,)
    x = args[0].masked_fill(args[0] != 0, _NAN) if any(padding) else args[0]
    averaged: Tensor = func(x, *args[1:], **kwargs)
    return averaged


def pad(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """Padding along channels leaves maps even; along anything else it does not."""
    x, amounts = args[0], args[1]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    inside = amounts[: 2 * (x.dim() - 2)] if x.dim() > 2 else amounts
    padded: Tensor = func(x.masked_fill(x != value, _NAN) if any(inside) else x, *args[1:], **kwargs)
    return padded
