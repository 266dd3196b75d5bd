"""Integer attributes of modules, such as numbers of channels and heads: found, compared, and written back."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from image_classification.models.whole_numbers import is_nested, numbers_in, replaced
from image_classification.plain_data import PlainValue

IntegerValue = int | list[int]


def integer_attributes(module: nn.Module) -> dict[str, int | list[int] | tuple[int, ...]]:
    """Return attributes that are integers, or lists or tuples of integers; booleans do not count.

    For other containers of plain values, the integers in them are returned as a list.
    """
    found = {}
    for name, value in vars(module).items():
        if is_integer_value(value):
            found[name] = value
        elif is_nested(value):
            found[name] = [number for _, number in numbers_in(value)]
    return found


def in_form_of(before: object, value: IntegerValue) -> object:
    """Convert saved integers to the form of the attribute that they belong to."""
    if not isinstance(value, list):
        return value
    if is_nested(before):
        paths = [path for path, _ in numbers_in(before)]
        return replaced(before, dict(zip(paths, value, strict=True)))
    return type(before)(value)  # type: ignore[call-arg]


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_integer_value(value: object) -> bool:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
        return len(value) > 0 and all(is_integer(item) for item in value)
    return is_integer(value)


def as_list(value: PlainValue) -> list[int]:
    return [value] if is_integer(value) else list(value)


def is_within(numbers: list[int], before: list[int]) -> bool:
    """Whether there are as many numbers as before, and none has grown."""
    return len(numbers) == len(before) and all(
        0 <= new <= old or new == old for new, old in zip(numbers, before, strict=True)
    )
