"""Records the numbers that a network's code gives to operators: thresholds, factors, bounds.

A threshold that follows from a width (`x.clamp(max=x.shape[1])`) changes with it. The outputs show that only where
values reach it, and those of a trial may not. Nor do they show a branch whose factor is zero at present, because it
fades in during training: in a trial, such a factor is another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs, Outputs, Running
from pruning.engine.operator_mode import OperatorMode

aten = torch.ops.aten

#: Numbers by the module whose code gave them and the operator that took them, in order.
Numbers = Mapping[tuple[str, str], list[float | complex]]

#: Types of arguments, as PyTorch names them, that are neither a size nor a dimension.
_VALUES = ("Tensor", "number", "float")
_RANGES = frozenset({"arange", "linspace", "logspace", "range"})  # their ends count positions
_MADE_OF_NUMBERS = frozenset({"lift_fresh", "lift_fresh_copy"})  # what `torch.tensor` ends in
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar})
_INSTEAD_OF_ZERO = 0.5


class NumbersNoted(OperatorMode):
    """Records every number that an operator is given as a value, and replaces factors of zero.

    Args:
        model: The network.
        running: The running modules.

    Attributes:
        numbers: What was recorded.
    """

    def __init__(self, model: nn.Module, running: Running) -> None:
        super().__init__()
        self.numbers: dict[tuple[str, str], list[float | complex]] = {}
        self._running = running
        self._single_buffers = {id(buffer) for buffer in model.buffers() if buffer.numel() == 1}

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """See `OperatorMode`."""
        found = list(_numbers_in(func, args, kwargs))
        if found:
            where = (self._running.innermost, func.overloadpacket.__name__)
            self.numbers.setdefault(where, []).extend(found)
        if func in _PRODUCTS:
            args = self._without_zero(args)
        return func(*args, **kwargs)

    def _without_zero(self, args: Args) -> Args:
        """Return the arguments of a product of a tensor, where a single number that is zero is another one."""
        one, other = args
        if self._is_zero(other) and _is_many(one):
            return one, _instead_of(other)
        if self._is_zero(one) and _is_many(other) and not isinstance(one, nn.Parameter):
            return _instead_of(one), other
        return args

    def _is_zero(self, value: object) -> bool:
        """Whether a factor is a number, a tensor without dimensions or a buffer of one element, and zero."""
        if not isinstance(value, Tensor):
            return value == 0
        single = value.dim() == 0 or id(value) in self._single_buffers
        return single and value.is_floating_point() and not value.is_meta and value.item() == 0


def _is_many(value: object) -> bool:
    """Whether a factor holds several numbers that may be activations."""
    return isinstance(value, Tensor) and value.numel() > 1 and value.is_floating_point()


def _instead_of(zero: object) -> object:
    return torch.full_like(zero, _INSTEAD_OF_ZERO) if isinstance(zero, Tensor) else _INSTEAD_OF_ZERO


def _numbers_in(func: OpOverload, args: Args, kwargs: Kwargs) -> Iterator[float | complex]:
    positions, names, makes_tensor = _places_of_numbers(func)
    if makes_tensor:
        yield from _single_number(args[0])
    elif _counts(args):
        return
    for position in positions:
        if position < len(args) and _is_number(args[position]):
            yield args[position]
    for name in names:
        if name in kwargs and _is_number(kwargs[name]):
            yield kwargs[name]


@functools.cache
def _places_of_numbers(func: OpOverload) -> tuple[tuple[int, ...], tuple[str, ...], bool]:
    """Return positions and names of an operator's arguments that can be values, and whether it makes a tensor."""
    name = func.overloadpacket.__name__
    if name in _RANGES:
        return (), (), False
    arguments = [
        (position, argument)
        for position, argument in enumerate(func._schema.arguments)
        if any(str(argument.type) in (kind, f"Optional[{kind}]") for kind in _VALUES)
    ]
    positions = tuple(position for position, argument in arguments if not argument.kwarg_only)
    return positions, tuple(argument.name for _, argument in arguments), name in _MADE_OF_NUMBERS


def _counts(args: Args) -> bool:
    """Whether an operator works on integers only: positions and counters, on which a number shows in any run."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return bool(tensors) and not any(
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool for tensor in tensors
    )


def _single_number(made: Any) -> Iterator[float | complex]:
    """Yield the number that a tensor was made of, if it is a single one."""
    if isinstance(made, Tensor) and made.numel() == 1 and made.dtype != torch.bool and not made.is_meta:
        yield made.item()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, complex)) and not isinstance(value, bool)


def differing(
    expected: Numbers, found: Numbers, same: Callable[[complex, complex], bool]
) -> tuple[tuple[str, str], float | complex] | None:
    """Return a number of the second run that the first did not give in its place, and where; None if there is none.

    Where a loop runs over channels, the second run gives fewer: each must be one of the first run's.
    """
    for where, numbers in found.items():
        others = expected.get(where, [])
        in_order = len(numbers) == len(others)
        for position, number in enumerate(numbers):
            candidates = others[position : position + 1] if in_order else others
            if not any(same(other, number) for other in candidates):
                return where, number
    return None
