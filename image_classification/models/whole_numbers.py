"""Integers nested in a module's attribute: in a dict, or in tuples within a tuple.

`{"heads": 4, "bias": True}` and `(("heads", 4),)` hold one such number each, at the paths ("heads",) and (0, 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Keys and positions that lead to a number.
Path = tuple[int | str, ...]

_LEAVES = (str, float, bool, type(None))
_MOST_NUMBERS = 64


def is_nested(value: object) -> bool:
    """Whether a value is a container of plain values, not itself a flat list, with integers in it."""
    if type(value) not in (dict, list, tuple) or not value:
        return False
    if type(value) is not dict and all(type(item) is int for item in value):  # type: ignore[attr-defined]
        return False
    return is_plain(value) and 0 < len(list(numbers_in(value))) <= _MOST_NUMBERS


def is_plain(value: object) -> bool:
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(is_plain(item) for item in value)  # type: ignore[attr-defined]
    return type(value) is int or isinstance(value, _LEAVES)


def numbers_in(value: object, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield every integer within containers, with the path to it, in order."""
    if type(value) is int:
        yield path, value
    elif type(value) is dict:
        for key, item in value.items():
            yield from numbers_in(item, (*path, key))
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):  # type: ignore[arg-type]
            yield from numbers_in(item, (*path, position))


def replaced(value: Any, numbers: Mapping[Path, int], path: Path = ()) -> Any:
    """Return a copy of the containers with other integers at some paths."""
    if type(value) is dict:
        return {key: replaced(item, numbers, (*path, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(replaced(item, numbers, (*path, number)) for number, item in enumerate(value))
    return numbers.get(path, value)
